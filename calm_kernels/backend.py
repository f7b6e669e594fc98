"""The one place that chooses an implementation.

Every public operation takes ``backend=`` and asks `resolve` which implementation to run:

* ``reference``: the formula as the paper writes it; defines correctness, never optimised;
* ``torch``: the best plain PyTorch, any device;
* ``triton``: fused kernels for NVIDIA and AMD GPUs (CPU tensors only in Triton's interpreter).

``auto`` takes Triton where a kernel can run (GPU tensors; any in the interpreter), else ``torch``,
and logs the choice once. The process-wide choice comes from `set_backend`, the `use_backend`
context or ``CALM_KERNELS_BACKEND``; an argument other than ``auto`` overrides it. An explicit
choice never falls back: it runs or raises.
"""

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

import torch
from torch import Tensor

__all__ = [
    "OPERATIONS", "Backend", "is_host_readable", "resolve", "set_backend", "use_backend",
    "use_overlap", "wants_overlap",
]  # fmt: skip

logger = logging.getLogger(__name__)


class Backend(StrEnum):
    """Implementation of an operation; strings are accepted wherever a `Backend` is."""

    AUTO = "auto"
    REFERENCE = "reference"
    TORCH = "torch"
    TRITON = "triton"


ENVIRONMENT_VARIABLE = "CALM_KERNELS_BACKEND"
OVERLAP_VARIABLE = "CALM_KERNELS_OVERLAP"

# What each operation implements. A new kernel is announced here and nowhere else.
_PORTABLE = frozenset({Backend.REFERENCE, Backend.TORCH})
_FUSED = _PORTABLE | {Backend.TRITON}
OPERATIONS: dict[str, frozenset[Backend]] = {
    "energy_score": _FUSED,
    "gaussian_energy_score": _FUSED,
    "reparameterize": _FUSED,
    "energy_head": _FUSED,
    "linear_argmax": _FUSED,
    "agreeing_patch": _FUSED,
    "linear_cross_entropy": _FUSED,
    "norm_linear": _FUSED,
    "norm_swiglu": _FUSED,
    "linear_residual": _FUSED,
    "decode_attention": _FUSED,
    "chunk_record": _FUSED,
    "advance_state": _FUSED,
    "uniform_draws": _FUSED,
    "normal_draws": _FUSED,
    "softmax_draws": _FUSED,
}


def _find_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # what stands in sys.modules under this name is no module
        return False


_HAS_TRITON = _find_triton()  # once: torch.compile of torch 2.11 cannot trace the search
# A plain global: torch.compile traces it and compiles again when it changes.
_process_backend: Backend | None = None
_process_overlap: bool | None = None
_logged: set[tuple[str, Backend]] = set()


def parse(backend: Backend | str, source: str = "backend") -> Backend:
    """`Backend` of a string, or a `ValueError` that names `source` and lists the choices."""
    if isinstance(backend, Backend):
        return backend
    try:
        return Backend(backend)
    except ValueError:
        choices = ", ".join(Backend)
        raise ValueError(f"{source} must be one of {choices}; got {backend!r}") from None


def set_backend(backend: Backend | str) -> None:
    """Set the backend of every later call in this process that leaves ``backend="auto"``."""
    global _process_backend
    _process_backend = parse(backend)


@contextmanager
def use_backend(backend: Backend | str) -> Iterator[None]:
    """Set the backend of this process inside a ``with`` block."""
    global _process_backend
    before, _process_backend = _process_backend, parse(backend)
    try:
        yield
    finally:
        _process_backend = before


@contextmanager
def use_overlap(is_on: bool) -> Iterator[None]:
    """Set whether launches of a decode step overlap in a ``with`` block; see `wants_overlap`."""
    global _process_overlap
    before, _process_overlap = _process_overlap, is_on
    try:
        yield
    finally:
        _process_overlap = before


def wants_overlap() -> bool:
    """Whether launches of a decode step should overlap where a GPU can (`calm_kernels.overlap`).

    Off unless `use_overlap` or ``CALM_KERNELS_OVERLAP=1`` says so. Results do not depend on it.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    if _process_overlap is not None:
        return _process_overlap
    chosen = os.environ.get(OVERLAP_VARIABLE, "0")
    if chosen not in ("0", "1"):
        raise ValueError(f"{OVERLAP_VARIABLE} must be 0 or 1, got {chosen!r}")
    return chosen == "1"


def _default() -> Backend:
    if _process_backend is not None:
        return _process_backend
    return parse(os.environ.get(ENVIRONMENT_VARIABLE, Backend.AUTO), ENVIRONMENT_VARIABLE)


def has_triton() -> bool:
    """Whether Triton can be imported (it is not imported here)."""
    return _HAS_TRITON


def is_interpreted() -> bool:
    """Whether Triton kernels run in the interpreter, where CPU tensors are allowed."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def is_host_readable(tensor: Tensor) -> bool:
    """Whether the host can read sizes from this tensor without waiting for a device.

    Code that decodes only what matters needs such reads; elsewhere all of it, in fixed shapes, is
    faster and can be captured in a graph.
    """
    return tensor.device.type == "cpu"


def resolve(
    backend: Backend | str, operation: str, tensor: Tensor, *, obstacle: str | None = None
) -> Backend:
    """The implementation that `operation` runs on the device of `tensor`; never ``auto``.

    Args:
        backend: what the caller asked for.
        operation: a key of `OPERATIONS`.
        tensor: an input; its device matters.
        obstacle: why no kernel can run these arguments, None if one can; ``auto`` then takes torch.

    Raises:
        ValueError: unknown name, or a Triton request for arguments that no kernel can run on.
        NotImplementedError: the operation has no such implementation.
        ImportError: Triton was asked for and is not installed.
    """
    chosen = parse(backend)
    if chosen is Backend.AUTO:
        chosen = _default()
    if chosen is Backend.AUTO:
        return _automatic(operation, tensor, obstacle)
    if chosen not in OPERATIONS[operation]:
        available = ", ".join(sorted(OPERATIONS[operation]))
        raise NotImplementedError(f"{operation} has no {chosen} backend; available: {available}")
    if chosen is Backend.TRITON:
        _require_triton(operation, tensor)
        if obstacle is not None:
            raise ValueError(f'{operation}: backend="triton" {obstacle}; use backend="torch"')
    return chosen


def _automatic(operation: str, tensor: Tensor, obstacle: str | None) -> Backend:
    can_run = (tensor.device.type == "cuda" or is_interpreted()) and obstacle is None
    use_triton = can_run and Backend.TRITON in OPERATIONS[operation] and has_triton()
    chosen = Backend.TRITON if use_triton else Backend.TORCH
    if not torch.compiler.is_compiling() and (operation, chosen) not in _logged:
        _logged.add((operation, chosen))
        logger.info("%s: backend %s (auto, tensors on %s)", operation, chosen, tensor.device.type)
    return chosen


def _require_triton(operation: str, tensor: Tensor) -> None:
    if not has_triton():
        raise ImportError(
            f'{operation}: backend="triton" needs the triton package (pip install triton); '
            'backend="torch" runs without it'
        )
    if tensor.device.type != "cuda" and not is_interpreted():
        raise ValueError(
            f'{operation}: backend="triton" needs tensors on a GPU, got {tensor.device}; '
            "move them, or set TRITON_INTERPRET=1 to run the kernels in the interpreter"
        )
