"""Hostile folders: no code of theirs runs, nothing is connected to, and there is no traceback.

Two controls show that the traps work: the flag that allows code does run it, and a hub that the
user names is asked for.
"""

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from calm.training.checkpoints.complete import write_manifest

from .commands import SIZES, make_models, run_command
from .report import Result, choose

__all__ = ["cases", "run"]

MARKER = "code-ran"
HUB = "someone/something"
CODE = f"""
from pathlib import Path
Path("{MARKER}").write_text("ran")
from transformers import PreTrainedTokenizerFast, PreTrainedConfig, PreTrainedModel
class Trap(PreTrainedTokenizerFast): pass
class TrapConfig(PreTrainedConfig): model_type = "trap"
class TrapModel(PreTrainedModel): config_class = TrapConfig
"""
YAML_TRAPS = (
    f'!!python/object/apply:os.system ["touch {MARKER}"]',
    f'!!python/object/new:os.system ["touch {MARKER}"]',
    f"!!python/object/apply:subprocess.check_output [[touch, {MARKER}]]",
    "!!python/name:os.system",
)


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {MARKER}",)


@dataclass(frozen=True)
class Case:
    """A trap in a copy of a folder, and the command that meets it.

    Attributes:
        name: of the trap.
        source: the folder that is copied to ``trap``.
        arm: puts the trap into the copy.
        words: of the command.
        expects: what happens to be right: nothing, "code" or "connection".
    """

    name: str
    source: str
    arm: Callable[[Path], None]
    words: tuple[str, ...]
    expects: str = ""


GENERATE = ("generate", "--model", "trap", "--prompt", "the quick br", "--max-new-tokens", "4")
EVAL = ("eval", "--model", "trap", "--data", "text.txt", "--block-size", "32", "--max-blocks", "1")
EXPERIMENT = ("experiment", "temperature", "--model", "trap", "--data", "text.txt",
              "--block-size", "32", "--quick", "--output-dir", "out")  # fmt: skip
PLAN = ("plan", "trap")
READERS = {"generate": GENERATE, "eval": EVAL, "experiment": EXPERIMENT, "plan": PLAN}
JOB = ("--train_file=text.txt", "--cache_dir=../cache", "--output_dir=out", "--block_size=32",
       "--use_cpu", "--max_steps=2", "--save_steps=1", "--validation_split_percentage=20",
       "--per_device_train_batch_size=1",
       "--dataloader_pin_memory=False", "--disable_tqdm=True")  # fmt: skip
TRAIN = ("train", *JOB, "--model_name_or_path=trap")
ON_TRAP = ("train", *JOB, "--ae_name_or_path=trap",
           f"--config_overrides={SIZES},num_attention_heads=2,num_hidden_layers=1")  # fmt: skip
AUTOENCODER = ("train-ae", *JOB, "--tokenizer_name=bytes",
               f"--config_overrides={SIZES},latent_size=8")  # fmt: skip


def change_json(path: Path, **entries: object) -> None:
    """Set entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def bomb(kind: str) -> bytes:
    """A file that runs code when it is unpickled: plain, or in torch's old or new format."""
    if kind == "pickle":
        return pickle.dumps({"weight": Bomb()}, protocol=2)
    memory = io.BytesIO()
    torch.save({"weight": Bomb()}, memory, _use_new_zipfile_serialization=kind == "zip")
    return memory.getvalue()


def weights_bomb(kind: str, name: str) -> Callable[[Path], None]:
    """The weights are a bomb called `name`."""

    def arm(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(bomb(kind))
        if name.endswith("00001-of-00001.bin"):
            index = {"metadata": {}, "weight_map": {"transformer.norm.weight": name}}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    return arm


def beside(name: str, kind: str = "pickle") -> Callable[[Path], None]:
    """A bomb beside the weights, in a file that a library may look for."""

    def arm(folder: Path) -> None:
        (folder / name).write_bytes(bomb(kind))

    return arm


def tokenizer_code(reference: str) -> Callable[[Path], None]:
    """The tokenizer wants code, beside it or from a hub."""

    def arm(folder: Path) -> None:
        (folder / "trap.py").write_text(CODE)
        entries = {"auto_map": {"AutoTokenizer": [reference, reference]}, "tokenizer_class": "Trap"}
        change_json(folder / "tokenizer_config.json", **entries)

    return arm


def model_code(reference: str) -> Callable[[Path], None]:
    """The model and its configuration want code."""

    def arm(folder: Path) -> None:
        (folder / "trap.py").write_text(CODE)
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(CODE)
        names = {"AutoConfig": f"{reference}Config", "AutoModel": f"{reference}Model"}
        names |= {"AutoModelForCausalLM": f"{reference}Model", "AutoTokenizer": reference}
        change_json(folder / "config.json", auto_map=names)

    return arm


def config_entries(**entries: object) -> Callable[[Path], None]:
    """Entries of config.json that lead elsewhere."""
    return lambda folder: change_json(folder / "config.json", **entries)


def without_autoencoder(folder: Path) -> None:
    """Only a name on a hub leads to the autoencoder."""
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | {"ae_path": HUB}
    fields.pop("ae_config")
    path.write_text(json.dumps(fields))


def without_autoencoder_weights(folder: Path) -> None:
    """The configuration is there, the weights of the autoencoder are on a hub."""
    from safetensors.torch import load_file, save_file

    change_json(folder / "config.json", ae_path=HUB)
    path = folder / "model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if "ae_model" not in name}
    save_file(kept, path, metadata={"format": "pt"})


def adapter(folder: Path) -> None:
    """An adapter whose base model is on a hub."""
    entries = {"base_model_name_or_path": HUB, "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(entries))


def yaml_trap(text: str) -> Callable[[Path], None]:
    """A recipe with a tag that would make an object."""

    def arm(folder: Path) -> None:
        (folder / "trap.yaml").write_text(f"learning_rate: {text}\n")

    return arm


def nothing(folder: Path) -> None:
    """No trap."""


def cases() -> list[Case]:
    """Every trap with every command that meets it."""
    found = []
    traps: dict[str, Callable[[Path], None]] = {
        f"{name} ({kind})": weights_bomb(kind, name)
        for name in ("pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "model.safetensors")
        for kind in ("pickle", "zip", "old")
    }
    traps |= {
        f"{name} beside": beside(name)
        for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.model",
                     "generation_config.json", "special_tokens_map.json")
    }  # fmt: skip
    traps |= {
        "code of the tokenizer": tokenizer_code("trap.Trap"),
        "code of the tokenizer, on a hub": tokenizer_code(f"{HUB}--trap.Trap"),
        "code of the model": model_code("trap.Trap"),
        "code of the model, on a hub": model_code(f"{HUB}--trap.Trap"),
        "ae_path on a hub": without_autoencoder,
        "ae_path on a hub, for weights": without_autoencoder_weights,
        "attention on a hub": config_entries(_attn_implementation=HUB, attn_implementation=HUB),
        "name on a hub": config_entries(_name_or_path=HUB, base_model_name_or_path=HUB),
        "quantized": config_entries(quantization_config={"quant_method": "gptq", "bits": 4}),
        "adapter": adapter,
    }
    for name, arm in traps.items():
        found += [Case(name, "calm", arm, words) for words in READERS.values()]
        found.append(Case(name, "calm", arm, TRAIN))
        if "ae_path" not in name:
            found.append(Case(name, "ae", arm, ON_TRAP))
            found.append(Case(name, "baseline", arm, GENERATE))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        for kind in ("pickle", "zip", "old"):
            words = (*AUTOENCODER, "--resume_from_checkpoint=true")
            found.append(
                Case(f"checkpoint with {name} ({kind})", "out", checkpoint(name, kind), words)
            )
    for index, text in enumerate(YAML_TRAPS):
        for words in (("plan", "trap/trap.yaml"), (*AUTOENCODER, "--config=trap/trap.yaml")):
            found.append(Case(f"YAML tag {index}", "ae", yaml_trap(text), words))
    trusted = (*GENERATE, "--trust-remote-code")
    found.append(
        Case("control: code allowed", "calm", tokenizer_code("trap.Trap"), trusted, "code")
    )
    named = (*GENERATE, "--tokenizer", HUB)
    found.append(Case("control: a hub named", "calm", nothing, named, "connection"))
    return found


def checkpoint(name: str, kind: str) -> Callable[[Path], None]:
    """A bomb in the last checkpoint of a run, which is otherwise whole."""

    def arm(folder: Path) -> None:
        last = max(folder.glob("checkpoint-*"))
        (last / name).write_bytes(bomb(kind))
        write_manifest(last)  # that matches: an attacker writes one too

    return arm


def run(folder: Path, count: int | None = None) -> list[Result]:
    """Every case, or `count` of them spread evenly and the controls, in a folder below `folder`."""
    work = folder / "work"
    work.mkdir(parents=True)
    make_models(work)
    shutil.copytree(work, work.parent / "clean")
    chosen = cases()
    controls = [case for case in chosen if case.expects]
    traps = [case for case in chosen if not case.expects]
    return [_judge(case, work) for case in [*choose(traps, count), *controls]]


def _judge(case: Case, work: Path) -> Result:
    clean = work.parent / "clean"
    if case.source == "out":  # a finished run, made once
        if not (clean / "out").exists():
            done = run_command(AUTOENCODER, work)
            assert done.status == 0, done.errors
            shutil.move(work / "out", clean / "out")
        shutil.copytree(clean / "out", work / "out")
        case.arm(work / "out")
    else:
        shutil.copytree(clean / case.source, work / "trap")
        case.arm(work / "trap")
    done = run_command(case.words, work, stdin="y\n" * 20)
    ran = (work / MARKER).exists()
    happened = "code" if ran else "connection" if done.connections else ""
    outcome = {"": "inert", "code": "code ran", "connection": "a connection was tried"}[happened]
    is_right = happened == case.expects and (done.is_clean or case.expects == "code")
    if not done.is_clean and not happened:
        outcome = "no single line"
    for name in ("trap", "out", MARKER):
        path = work / name
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    detail = f"{done.connections[:2]} {done.last_line[:300]}"
    return Result(f"{case.name}: {' '.join(case.words[:2])}", outcome, is_right, detail)
