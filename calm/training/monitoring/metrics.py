"""Measurements during training: kept on the device and read once per logging interval."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from calm.errors import UserError
from calm.labels import Term

__all__ = [
    "ADVICE",
    "FiniteGuard",
    "MeanLoss",
    "NonFiniteLossError",
    "RunningMeans",
    "recall",
    "remember",
    "whole_norm",
]

# What to do about a loss, gradient or weight that is not finite.
ADVICE = (
    "check that data, and go on with a smaller learning rate (--learning_rate X --allow_changes), "
    "if need be from an earlier checkpoint (--resume_from_checkpoint FOLDER), or start afresh with "
    "a longer warm-up"
)

MOST_VALUES = 4096  # that are watched before they are checked

Gather = Callable[[Tensor], Tensor]


class NonFiniteLossError(UserError):
    """The loss or the gradient stopped being a number."""


def whole_norm(norm: Tensor | float) -> Tensor:
    """A gradient's norm in float32, ``[]``; sharded training gives a DTensor."""
    whole = getattr(norm, "full_tensor", lambda: norm)()
    return torch.as_tensor(whole, dtype=torch.float32).detach()


class RunningMeans:
    """Means of named terms over an interval and all processes: sums and counts, divided once.

    `add` does not synchronise.
    """

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}

    def add(self, terms: Mapping[str, Term]) -> None:
        """Add the terms of one micro-batch."""
        for name, (sums, counts) in terms.items():
            count = counts.sum(dtype=torch.float64)
            total = torch.cat([sums.sum(0, dtype=torch.float64).reshape(-1), count[None]])
            self._totals[name] = self._totals[name] + total if name in self._totals else total

    def drain(self, gather: Gather) -> dict[str, Tensor]:
        """The means so far, each flat, ``[n]``; 0 where nothing counted. Resets them.

        Args:
            gather: collects a tensor ``[1, n]`` of every process.
        """
        totals, self._totals = self._totals, {}
        if not totals:
            return {}
        gathered = gather(torch.cat(list(totals.values()))[None]).sum(0).cpu()
        parts = gathered.split([len(total) for total in totals.values()])
        means = [part[:-1] / part[-1].clamp(min=1) for part in parts]
        return dict(zip(totals, means, strict=True))


def remember(state: TrainerState, callback: ExportableState) -> None:
    """Give `callback` its place in `state`, whose checkpoint may come from a run without it."""
    known: Any = state.stateful_callbacks  # a mapping, although transformers declares a list
    if known is not None:
        known.setdefault(type(callback).__name__, callback.state())


def recall(state: TrainerState, callback: ExportableState) -> dict[str, Any] | None:
    """What the checkpoint of `state` has kept of `callback`; None if nothing."""
    known: Any = state.stateful_callbacks or {}
    saved = known.get(type(callback).__name__)
    return saved["args"] if isinstance(saved, dict) else None


class MeanLoss(TrainerCallback, ExportableState):
    """Mean of the losses of all steps of a run, those before it was resumed included.

    transformers knows the steps since the last start alone. Here every checkpoint holds the sum.

    Args:
        total: sum of the losses of earlier steps.
        steps: their number.
    """

    def __init__(self, total: float = 0.0, steps: int = 0) -> None:
        self.total = total
        self.steps = steps
        self._pending: Tensor | None = None

    def add(self, loss: Tensor) -> None:
        """Add what a micro-batch contributes to the loss of its step. Does not synchronise."""
        loss = loss.detach().double()
        self._pending = loss if self._pending is None else self._pending + loss

    def collect(self, gather: Gather) -> None:
        """Bring what was added into `total`; a step's loss is the mean over processes."""
        if self._pending is not None:
            self.total += gather(self._pending[None]).mean().item()
            self._pending = None

    @property
    def mean(self) -> float:
        """The mean; 0 before the first step."""
        return self.total / max(1, self.steps)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {"total": self.total, "steps": self.steps}, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on from what the checkpoint holds, if any."""
        kept = (state.global_step and recall(state, self)) or {"total": 0.0, "steps": 0}
        self.total, self.steps = kept["total"], kept["steps"]
        self._pending = None
        remember(state, self)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the step."""
        self.steps += 1


@dataclass(frozen=True)
class _Event:
    """Where one watched value comes from."""

    step: int
    learning_rate: float
    where: str


class FiniteGuard:
    """Finds the first loss or gradient norm that is not finite, and reports where it happened.

    Watching a value does not synchronise with the device. `check` does; it runs at every log,
    before anything is evaluated or saved, and where neither comes, when the guard `is_full`.
    """

    def __init__(self) -> None:
        self._events: list[_Event] = []
        self._values: list[Tensor] = []
        self._norms: dict[int, Tensor] = {}

    def watch_loss(self, loss: Tensor, *, step: int, learning_rate: float, where: str) -> None:
        """Watch the loss of a micro-batch of `step`; `where` names its position in the data."""
        self._events.append(_Event(step, learning_rate, f"loss at {where}"))
        self._values.append(loss.detach().float())

    def watch_norm(self, norm: Tensor | float, *, step: int, learning_rate: float) -> None:
        """Watch the gradient norm of `step`."""
        value = whole_norm(norm)
        self._events.append(_Event(step, learning_rate, "gradient norm"))
        self._values.append(value)
        self._norms[step] = value

    @property
    def is_full(self) -> bool:
        """Whether `check` is due, so that a run without logs does not hold ever more values."""
        return len(self._values) >= MOST_VALUES

    def check(self, gather: Gather, last_good: Callable[[], object]) -> None:
        """Clear the watched values if all of them are finite on every process.

        Args:
            gather: collects a tensor ``[n]`` of every process.
            last_good: finds the last good checkpoint, for the message.

        Raises:
            NonFiniteLossError: with step, learning rate, gradient norm and position of the first
                bad value.
        """
        if not self._values:
            return
        device = self._values[0].device
        values = torch.stack([value.to(device) for value in self._values])
        first = (~values.isfinite()).float().argmax()
        index = torch.where(values.isfinite().all(), -1, first)
        if int(gather(index[None]).max()) < 0:
            self._events.clear()
            self._values.clear()
            self._norms = dict(list(self._norms.items())[-1:])
            return
        raise NonFiniteLossError(self._report(int(index), values, last_good()))

    def _report(self, index: int, values: Tensor, last_good: object) -> str:
        kept = f"the last good checkpoint is {last_good}" if last_good else "there is no checkpoint"
        if index < 0:
            return f"another process met a loss that is not finite; {kept}"
        event = self._events[index]
        norms = [
            f"{self._norms[step].item():.4g} at step {step}"
            for step in (event.step - 1, event.step)
            if step in self._norms
        ]
        return (
            f"{event.where} is {values[index].item()} in step {event.step}: learning rate "
            f"{event.learning_rate:.4g}, gradient norm {', '.join(norms) or 'not yet known'}; "
            f"{kept}; {ADVICE}"
        )
