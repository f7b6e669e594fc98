"""Decode steps captured as CUDA graphs, and which of them a model keeps.

A decode step of a small batch on a GPU is hundreds of kernels of a few microseconds each. Replayed
from one graph they run without waiting for the host. Seeds, tokens and the position in the cache
are in device memory, and the step itself advances them, so that every replay makes new draws.

A graph reads the model's own weights: the next replay sees a write of any kind (an optimiser's
step, `load_state_dict`, `copy_`, ``weight.data``). A step is captured again when the model has
another module, hook or attribute, or a weight at another address (`_signature`).
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from calm.decoding.engine.decode_step import DecodeState, decode_step
from calm.decoding.engine.predictors import Predictor
from calm_kernels.backend import Backend, resolve, wants_overlap

__all__ = ["CapturedStep", "captured_step"]

MIN_CAPACITY = 64  # chunks; caches double from there, so that few graphs serve texts of all lengths
MAX_GRAPHS = 4  # each holds a cache
WARMUP_STEPS = 3
ATTRIBUTE = "_captured_steps"  # where a model keeps them


@dataclass
class CapturedStep:
    """A decode step on fixed memory that replays from a CUDA graph.

    Attributes:
        state: the memory; `prefill` and `first_chunk` fill it as they fill any other.
    """

    state: DecodeState
    _graph: torch.cuda.CUDAGraph
    _packed: Tensor

    @classmethod
    def capture(cls, state: DecodeState) -> "CapturedStep":
        """Capture `decode_step` on this state, whose cache is fixed; its contents are lost."""
        device = state.seed.device
        warmup, captured = _streams(device)
        warmup.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), torch.cuda.stream(warmup):
            for _ in range(WARMUP_STEPS):  # compile kernels, fill caches of tables
                decode_step(state)
        torch.cuda.current_stream(device).wait_stream(warmup)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, stream=captured):
            packed = decode_step(state)
        torch.cuda.synchronize(device)
        return cls(state, graph, packed)

    def replay(self) -> Tensor:
        """As `decode_step`."""
        self._graph.replay()
        return self._packed.clone()


@cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Where steps of a device warm up, and where they are captured.

    They are kept because cuBLAS keeps memory for each stream. torch's own stream for captures would
    belong to the device that captured first.
    """
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


@dataclass
class _CapturedSteps:
    """The steps that one model keeps; a copy of the model starts without any."""

    signature: list[Any] = field(default_factory=list)
    steps: dict[tuple[Any, int], CapturedStep] = field(default_factory=dict)
    reserved: dict[Any, int] = field(default_factory=dict)  # chunks that a warm-up asked for

    def __deepcopy__(self, memo: dict[int, Any]) -> "_CapturedSteps":
        return _CapturedSteps()

    def __reduce__(self) -> tuple[Any, ...]:
        return _CapturedSteps, ()


def captured_step(
    predictor: Predictor, *, batch_size: int, capacity: int, is_reserved: bool = False
) -> CapturedStep:
    """A captured step for texts of up to `capacity` chunks; the last few are kept, with caches.

    Rounding may depend on the size of the cache. Therefore the size does not depend on what was
    generated before: it is the next of 64, 128, 256, ... chunks. A step that `is_reserved` is the
    exception: it serves all texts that need no more.
    """
    kept = _kept_steps(predictor.model)
    # A graph keeps the backend that was chosen while it was captured, and how its kernels follow.
    backend = resolve(Backend.AUTO, "linear_argmax", predictor.backbone.norm.weight)
    use = (predictor, batch_size, backend, wants_overlap())
    capacity = max(MIN_CAPACITY, 1 << (capacity - 1).bit_length(), kept.reserved.get(use, 0))
    if is_reserved:
        kept.reserved[use] = capacity
    key, steps = (use, capacity), kept.steps
    if key in steps:
        steps[key] = steps.pop(key)  # the latest last
        return steps[key]
    while len(steps) >= MAX_GRAPHS:
        del steps[next(iter(steps))]
    # A tensor made in inference mode cannot be written outside of it, as a later call may do.
    with torch.inference_mode(False), torch.no_grad():
        state = DecodeState.allocate(
            predictor, batch_size=batch_size, capacity=capacity, is_fixed=True
        )
        steps[key] = CapturedStep.capture(state)
    return steps[key]


def _kept_steps(model: nn.Module) -> _CapturedSteps:
    """What the model keeps; its steps are dropped if the model's signature has changed."""
    kept: _CapturedSteps = model.__dict__.setdefault(ATTRIBUTE, _CapturedSteps())
    signature = _signature(model)
    if kept.signature != signature:
        kept.signature, kept.steps = signature, {}
    return kept


def _signature(model: nn.Module) -> list[Any]:
    """What a graph depends on: modules, their hooks and attributes, and the addresses of tensors.

    It holds the modules themselves, because a new module may get the `id` of an old one.
    """
    found: list[Any] = [repr(getattr(model.config, "tempered_spread", None))]  # read on the host
    for module in model.modules():
        found += [module, len(vars(module)), len(module._forward_hooks), module.training]
        found.append(len(module._forward_pre_hooks))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                found.append((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()))
    return found
