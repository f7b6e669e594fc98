"""Refusing what cannot fit into memory, before the machine starts to kill programs."""

import os
import sys
from typing import Any

import torch

from calm.errors import UserError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment] # a module is declared

__all__ = ["check_draws", "check_memory", "peak_memory"]


def check_memory(what: str, needed: int, device: torch.device) -> None:
    """Raise a `UserError` if `needed` bytes, a lower bound, exceed the memory of `device`.

    Args:
        what: needs them, for the message.
        needed: bytes that `what` takes at the very least.
        device: where.
    """
    there = _memory(device)
    if there is not None and needed > there:
        raise UserError(
            f"{what} takes at least {needed / 2**30:,.1f} GiB of memory; {device} has "
            f"{there / 2**30:,.1f} GiB"
        )


def check_draws(model: Any, argument: str, num_samples: int, positions: int) -> None:
    """`check_memory` of the latents that the head of a CALM draws at once, and of their noise.

    Args:
        model: of any kind; a CALM alone draws latents.
        argument: the name of `num_samples`, for the message.
        num_samples: draws of a chunk.
        positions: chunks that are drawn at once.
    """
    config = model.config
    if not hasattr(config, "noise_size"):
        return
    row = (config.latent_size + config.noise_size) * model.dtype.itemsize
    what = f"{argument}={num_samples} ({positions} chunks at once)"
    check_memory(what, num_samples * positions * row, model.device)


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that this process has held so far; None where the system does not say.

    On a GPU what torch has allocated there, on a CPU the whole process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _memory(device: torch.device) -> int | None:
    """Bytes of memory of `device`, all of it; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu":
        return None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # another system
        return None
