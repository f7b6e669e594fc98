"""Files that are known to be those that were written.

A folder of weights is complete once it has a manifest: its files with their sizes and hashes,
written after all of them and moved into place in one step. A run that was killed, or whose disk
filled up, leaves no manifest, or one that the files do not match. A changed bit changes the hash.
"""

import json
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from calm.errors import UserError

__all__ = [
    "MANIFEST",
    "check_files",
    "check_finite",
    "find_damage",
    "find_non_finite",
    "listed_names",
    "new_digest",
    "saved_shapes",
    "saved_weights",
    "weights_hash",
    "write_atomically",
    "write_manifest",
]

MANIFEST = "manifest.json"
BLOCK = 1 << 22  # bytes hashed at a time

# Any one of the patterns in a row will do: weights whole or in shards, by transformers or FSDP.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model_fsdp*")
LARGE = (".safetensors", ".bin", ".pt", ".pth", ".tokens", ".documents")
MODEL_FILES = (("config.json",), WEIGHTS)


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(partial, path)


def new_digest(start: bytes = b"") -> Any:
    """XXH3 of 128 bits, to be updated.

    Imported here: a machine without it can still train and time models.
    """
    try:
        import xxhash
    except ImportError:
        raise UserError("files are saved and checked with hashes: pip install xxhash") from None
    return xxhash.xxh3_128(start)


def _hash(path: Path) -> str:
    """XXH3 of a file, 128 bits in hexadecimal: fast, and no defence against an attacker."""
    digest = new_digest()
    with path.open("rb") as handle:
        while block := handle.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _digest(files: dict[str, Any]) -> str:
    """Of a manifest's own entries, so that a changed bit in it shows too."""
    return new_digest(json.dumps(files, sort_keys=True).encode()).hexdigest()


def write_manifest(
    folder: Path,
    is_listed: Callable[[str], bool] | None = None,
    hashes: Mapping[str, str] | None = None,
) -> None:
    """Declare the files in `folder` complete, once they have reached the disk.

    All files get the same permissions, those that the umask allows.

    Args:
        folder: of a checkpoint, a model or a prepared text.
        is_listed: which names belong to it; None for all files in it, those in subfolders too.
        hashes: of files that have reached the disk already, by name: these are not read again.
    """
    known = hashes or {}
    umask = os.umask(0)
    os.umask(umask)
    files = {}
    for path in sorted(folder.rglob("*") if is_listed is None else folder.iterdir()):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name == MANIFEST or (is_listed and not is_listed(name)):
            continue
        with suppress(OSError):  # not all file systems know modes
            path.chmod(0o666 & ~umask)
        if name not in known:
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        files[name] = {"size": path.stat().st_size, "xxh3_128": known.get(name) or _hash(path)}
    manifest = {"files": files, "digest": _digest(files)}
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def find_damage(folder: Path, required: Iterable[tuple[str, ...]] = MODEL_FILES) -> str | None:
    """Why the files in `folder` cannot be used, or None if all are those that were written.

    Args:
        folder: of a checkpoint or a model.
        required: tuples of file name patterns; a file of each tuple must be listed.
    """
    try:
        files = _read_manifest(folder)
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it was never finished, or written by another program"
    except (OSError, ValueError) as error:
        return f"its {MANIFEST} is unreadable ({error})"
    for patterns in required:
        if not any(fnmatch(name, pattern) for name in files for pattern in patterns):
            return f"its {MANIFEST} lists no {patterns[0]}"
    for name, entry in files.items():
        if reason := _mismatch(folder / name, name, entry) or _unreadable(folder / name, name):
            return reason
    return None


def listed_names(folder: Path) -> set[str]:
    """Files and folders in `folder` that its manifest lists; none where it cannot be read."""
    try:
        return {Path(name).parts[0] for name in _read_manifest(folder)}
    except (OSError, ValueError):
        return set()


def check_files(folder: str | os.PathLike[str] | None, *, only_small: bool = False) -> None:
    """Raise `UserError` if files in `folder` are not those that its manifest lists.

    A folder without a manifest passes: other programs write none. So does a listed file that is
    gone, since a model can be loaded without the optimizer of its checkpoint.

    Args:
        folder: of a checkpoint or a model, or a hub name.
        only_small: skip weights, states of a run and shards of a text, which take long.
    """
    path = Path(str(folder))
    if folder is None or not (path / MANIFEST).is_file():
        return
    try:
        files = _read_manifest(path)
    except ForeignManifestError:
        return
    except (OSError, ValueError) as error:
        raise UserError(f"{path / MANIFEST} is unreadable ({error}): {_advice(path)}") from error
    for name, entry in files.items():
        if only_small and name.endswith(LARGE):
            continue
        if (path / name).exists() and (reason := _mismatch(path / name, name, entry)):
            raise UserError(f"{path} is damaged: {reason}: {_advice(path)}")


def _advice(folder: Path) -> str:
    return f"take another copy, or delete {folder / MANIFEST} if you changed the files yourself"


class ForeignManifestError(ValueError):
    """A file of this name that is no list of files."""


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Names and entries; an older version wrote sizes alone, and no digest."""
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    files = content.get("files") if isinstance(content, dict) else None
    if isinstance(content, dict) and not {"files", "digest"} & content.keys():
        raise ForeignManifestError("another program wrote it")
    if not isinstance(files, dict):
        raise ValueError('no mapping "files" in it')
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{name!r} lies outside the folder")
    if files and all(isinstance(size, int) for size in files.values()):
        return {name: {"size": size} for name, size in files.items()}
    if content.get("digest") != _digest(files):
        raise ValueError("its entries are not those that were written")
    return files


def _mismatch(path: Path, name: str, entry: dict[str, Any]) -> str | None:
    """How the file differs from its entry in the manifest, or None."""
    if not path.is_file():
        return f"{name} is missing"
    if (size := path.stat().st_size) != entry["size"]:
        return f"{name} holds {size} bytes instead of {entry['size']}"
    if "xxh3_128" in entry and _hash(path) != entry["xxh3_128"]:
        return f"the bytes of {name} are not those that were written"
    return None


def _unreadable(path: Path, name: str) -> str | None:
    """Why the file cannot be opened, although it is as it was written, or None."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as weights:
                weights.keys()
        elif path.suffix in (".pt", ".pth", ".bin"):
            from transformers.trainer_pt_utils import safe_globals  # slow, and a run alone needs it

            with safe_globals():  # arrays of numpy, in the generators' states
                torch.load(path, weights_only=True, mmap=True, map_location="meta")
    except pickle.UnpicklingError:
        return f"{name} cannot be read (it is damaged, or would run code)"
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError) as error:
        return f"{name} cannot be read ({' '.join(str(error).split())})"
    return None


def find_non_finite(weights: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first weight that holds an infinity or NaN, or None. Copies no weight."""
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, weight in weights:
        weight = getattr(weight, "to_local", lambda weight=weight: weight)()
        if weight.numel() and weight.is_floating_point():
            by_device.setdefault(weight.device, []).append((name, weight.detach()))
    for named in by_device.values():
        extremes = torch.stack([torch.stack(weight.aminmax()).float() for _, weight in named])
        is_finite = torch.isfinite(extremes).all(dim=1)
        if not is_finite.all():
            return named[int(is_finite.to(torch.uint8).argmin())][0]
    return None


def check_finite(weights: Iterable[tuple[str, Tensor]], owner: str) -> None:
    """Raise `UserError` if a weight of `owner` is not finite."""
    if name := find_non_finite(weights):
        raise UserError(
            f"weight {name} of {owner} is not finite: the file is damaged or training diverged; "
            "load an earlier checkpoint"
        )


def weights_hash(model: nn.Module) -> str:
    """XXH3 of the weights of `model`, 128 bits in hexadecimal, by their names in order."""
    digest = new_digest()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def saved_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of all safetensors files in `folder`, one in memory at a time."""
    return ((name, file.get_tensor(name)) for name, file in _saved(folder))


def saved_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of all weights in `folder`, from the files' headers."""
    return {name: list(file.get_slice(name).get_shape()) for name, file in _saved(folder)}


def _saved(folder: Path) -> Iterator[tuple[str, Any]]:
    """Names of all weights in `folder`, each with its open file."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 # not a mapping
                yield name, file
