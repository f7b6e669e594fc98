"""What generation keeps between calls: arranged weights, and steps captured as CUDA graphs.

A step of a small batch on a GPU is hundreds of kernels of a few microseconds; replayed from one
graph they follow each other without the host. Seeds, tokens and the position in the cache live in
device memory that the step itself moves on, so every replay draws afresh.

Both are tied to the weights they were made from: when a weight has moved or changed, they are made
anew.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calm.decoding.engine.backbone import CachedBackbone
from calm.decoding.engine.decode_step import State, decode_step
from calm.decoding.engine.predictors import Predictor
from calm.errors import UserError
from calm_kernels.backend import Backend, resolve

__all__ = ["Arranged", "CapturedStep", "arranged", "captured_step"]

LEAST_CAPACITY = (
    64  # chunks; caches double from there, so that few graphs serve texts of all lengths
)
MAX_GRAPHS = 4  # each holds a cache
WARMUP_STEPS = 3
KEPT = "_kept_for_decoding"  # where a model keeps it


@dataclass
class CapturedStep:
    """A step on fixed memory that replays from a CUDA graph.

    Attributes:
        state: the memory; `prefill` and `first_chunk` fill it as they fill any other.
    """

    state: State
    _graph: torch.cuda.CUDAGraph
    _record: Tensor

    @classmethod
    def capture(cls, state: State) -> "CapturedStep":
        """Capture `decode_step` on this state, whose cache is fixed; its contents are lost."""
        device = state.seed.device
        aside, captured = _streams(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), torch.cuda.stream(aside):
            for _ in range(WARMUP_STEPS):  # compile kernels, fill caches of tables
                decode_step(state)
        torch.cuda.current_stream(device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, stream=captured):
            record = decode_step(state)
        torch.cuda.synchronize(device)
        return cls(state, graph, record)

    def replay(self) -> Tensor:
        """As `decode_step`."""
        self._graph.replay()
        return self._record.clone()


@cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Where steps of a device warm up, and where they are captured.

    They are kept, because cuBLAS keeps memory for each stream. torch's own stream for captures
    would be one of the device that captured first.
    """
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


class Arranged(NamedTuple):
    """A model's weights, laid out for chunk after chunk.

    Attributes:
        trunk: its backbone.
        twin: the model with its other weights laid out; None where they are as they should be.
    """

    trunk: CachedBackbone
    twin: PreTrainedModel | None

    def predictor(self, predictor: Predictor) -> Predictor:
        """A predictor of the model on these weights."""
        return predictor if self.twin is None else predictor.using(self.twin)


@dataclass
class _Kept:
    """What one model keeps; a copy of the model starts with nothing."""

    weights: tuple[Any, ...] = ()
    arranged: Arranged | None = None
    steps: dict[tuple[Any, int], CapturedStep] = field(default_factory=dict)
    reserved: dict[Any, int] = field(default_factory=dict)  # chunks that a warm-up asked for

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Kept":
        return _Kept()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Kept, ()


def arranged(predictor: Predictor) -> Arranged:
    """The weights of the predictor's model, arranged once.

    Raises:
        UserError: a weight of the model is not finite. Its text would be of one token, as NaN has
            no order, and attention may even hide it.
    """
    return _arranged(_kept(predictor), predictor)


def _arranged(kept: _Kept, predictor: Predictor) -> Arranged:
    if kept.arranged is None:
        _check_finite(predictor.model)
        with torch.inference_mode(False), torch.no_grad():  # a later call may be outside of it
            trunk, twin = CachedBackbone(predictor.backbone), predictor.arrange()
        if twin is predictor.model:
            twin = None
        else:
            vars(twin).pop(KEPT)  # lest each keep the other alive
        kept.arranged = Arranged(trunk, twin)
    return kept.arranged


def _check_finite(model: PreTrainedModel) -> None:
    names, weights = zip(*model.named_parameters(), strict=True)
    is_finite = torch.stack([torch.isfinite(weight.detach()).all() for weight in weights])
    if not is_finite.all():
        name = names[int(is_finite.to(torch.uint8).argmin())]
        raise UserError(
            f"the model's weight {name} is not finite: the file is damaged or training diverged; "
            "load an earlier checkpoint"
        )


def captured_step(
    predictor: Predictor, *, batch_size: int, capacity: int, is_reserved: bool = False
) -> CapturedStep:
    """A captured step for texts of up to `capacity` chunks; the last few are kept, with caches.

    Rounding may depend on the size of the cache. It is the next of 64, 128, 256, ... chunks,
    whatever was generated before, unless a step `is_reserved`: that serves all that need no more.
    """
    kept = _kept(predictor)  # once: it reads from the device
    weights, steps, reserved = _arranged(kept, predictor), kept.steps, kept.reserved
    # A graph holds the choice that is made while it is captured.
    backend = resolve(Backend.AUTO, "linear_argmax", weights.trunk.norm)
    use = (predictor, batch_size, backend)
    capacity = max(LEAST_CAPACITY, 1 << (capacity - 1).bit_length(), reserved.get(use, 0))
    if is_reserved:
        reserved[use] = capacity
    key = (use, capacity)
    if key in steps:
        steps[key] = steps.pop(key)  # the latest last
        return steps[key]
    while len(steps) >= MAX_GRAPHS:
        del steps[next(iter(steps))]
    # Memory of inference mode could not be written outside of it, where a later call may be.
    with torch.inference_mode(False), torch.no_grad():
        state = State.allocate(
            weights.predictor(predictor),
            weights.trunk,
            batch_size=batch_size,
            capacity=capacity,
            is_fixed=True,
        )
        steps[key] = CapturedStep.capture(state)
    return steps[key]


def _kept(predictor: Predictor) -> _Kept:
    """What the model keeps, if its weights are those it was made from; else nothing yet."""
    kept: _Kept = predictor.model.__dict__.setdefault(KEPT, _Kept())
    weights = _fingerprint(predictor.model)
    if kept.weights != weights:
        kept.weights, kept.arranged, kept.steps = weights, None, {}
    return kept


def _fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """Changes when a module is replaced or patched, when weights move or are changed in place.

    Writing through ``weight.data`` (averaged weights swapped in, say) counts as no change there, so
    the sum of the first rows of all matrices is part of it.
    """
    found: list[Any] = []
    rows: list[Tensor] = []
    _describe(model, found, rows)
    return float(torch.cat(rows).sum(dtype=torch.float32)), *found


def _describe(module: nn.Module, found: list[Any], rows: list[Tensor]) -> None:
    """What `_fingerprint` compares: `model.parameters()` would take twice its time."""
    found.append((id(module), len(vars(module))))
    for weight in module._parameters.values():
        if weight is not None:
            found.append((weight.data_ptr(), _version(weight)))
            if weight.dim() == 2:
                rows.append(weight.detach()[0])
    for part in module._modules.values():
        if part is not None:
            _describe(part, found, rows)


def _version(weight: Tensor) -> int:
    """How often a weight was changed in place; inference tensors do not count."""
    return 0 if weight.is_inference() else weight._version
