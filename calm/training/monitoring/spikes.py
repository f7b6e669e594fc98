"""Spikes of the gradient: an update far larger than those before it, found before it is made.

A norm above ``max_gradient_spike`` times the median of the last `WINDOW` norms is a spike. It stops
the run, or with ``on_spike=skip`` its step alone changes no weight. The batch is kept for a look in
``spikes/step-<N>.safetensors`` in either case.
"""

import logging
import math
import os
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from calm.errors import UserError
from calm.training.checkpoints.complete import last_good_checkpoint
from calm.training.monitoring.metrics import Gather, recall, remember, whole_norm

__all__ = ["POLICIES", "GradientSpikeError", "SpikeGuard", "check_spikes"]

logger = logging.getLogger(__name__)

POLICIES = ("stop", "skip")
WINDOW = 100  # norms whose median is compared
LEAST = 20  # norms before the first comparison
FOLDER = "spikes"


def check_spikes(training: Any) -> None:
    """Refuse flags about spikes that say nothing, or that nobody could follow.

    Args:
        training: `calm.training.flags.arguments.CALMTrainingArguments`.

    Raises:
        UserError: no such policy, one without ``max_gradient_spike``, or DeepSpeed, which updates
            weights before a norm is known.
    """
    if training.on_spike not in POLICIES:
        raise UserError(f"on_spike must be {' or '.join(POLICIES)}, got {training.on_spike!r}")
    if not training.max_gradient_spike:
        if training.on_spike != POLICIES[0]:
            raise UserError("on_spike needs max_gradient_spike, such as 10, which finds spikes")
        return
    if training.deepspeed:
        raise UserError("max_gradient_spike: deepspeed updates weights before a norm is known")


class GradientSpikeError(UserError):
    """The gradient was far larger than before."""


class SpikeGuard(TrainerCallback, ExportableState):
    """Compares the norm of each step's gradient with the median of those before it.

    Norms that are not finite are the matter of `FiniteGuard` (metrics.py). A spike counts
    among the norms of later steps: where the gradient stays larger, it soon is none any more. Every
    checkpoint holds the norms, so that a resumed run finds the same spikes. Reading a norm takes
    one synchronisation with the device a step.

    Args:
        factor: times the median, at least 1.
        policy: one of `POLICIES`.
        folder: of the run.
        gather: collects a tensor of every process, along its first dimension.
        is_writer: whether this process writes files.
    """

    def __init__(
        self, factor: float, policy: str, folder: Path, gather: Gather, *, is_writer: bool = True
    ) -> None:
        self.factor, self.policy, self.folder = factor, policy, folder
        self._gather, self._is_writer = gather, is_writer
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._skipped = 0

    @classmethod
    def of(cls, args: Any, gather: Gather) -> Self | None:
        """What the flags `args`, `CALMTrainingArguments`, ask for; None for nothing."""
        if not args.max_gradient_spike:
            return None
        return cls(
            args.max_gradient_spike, args.on_spike, args.folder, gather, is_writer=args.should_save
        )

    def skips(
        self,
        norm: Tensor | float,
        step: int,
        learning_rate: float,
        batches: Sequence[Mapping[str, Tensor]],
    ) -> bool:
        """Whether the step must not change any weight.

        Args:
            norm: of the gradient, before it is clipped.
            step: from 1.
            learning_rate: of its update.
            batches: its micro-batches on this process, as many on each.

        Raises:
            GradientSpikeError: it is a spike, and the policy is to stop.
        """
        median = self.median
        value = self._gather(whole_norm(norm)[None])[0].item()  # of the first, for all alike
        if not math.isfinite(value):
            return False
        self._norms.append(value)
        if not median or value <= self.factor * median:
            return False
        known = {"step": step, "norm": value, "median": median, "learning_rate": learning_rate}
        path = self._keep(known, batches)
        found = (
            f"the gradient norm {value:.4g} of step {step} is {value / median:.3g} times the "
            f"median {median:.4g} of those before it (learning rate {learning_rate:.4g}, "
            f"max_gradient_spike {self.factor:g}); the batch is in {path}"
        )
        if self.policy == "skip":
            self._skipped += 1
            logger.warning("%s; the step is skipped", found)
            return True
        good = last_good_checkpoint(self.folder, set_aside=False)
        raise GradientSpikeError(
            f"{found}; the last good checkpoint is {good or 'none'}; look at the batch, and go on "
            "without its update (--on_spike skip --allow_changes), or with a smaller learning rate "
            "(--learning_rate X --allow_changes)"
        )

    @property
    def median(self) -> float | None:
        """Of the last norms; None before there are enough."""
        return statistics.median(self._norms) if len(self._norms) >= LEAST else None

    def drain(self) -> dict[str, float]:
        """How many steps were skipped since the last call."""
        skipped, self._skipped = self._skipped, 0
        return {"skipped_steps": skipped}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {"norms": list(self._norms)}, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on from what the checkpoint holds, if any."""
        kept = state.global_step and recall(state, self)
        self._norms = deque(kept["norms"] if kept else (), maxlen=WINDOW)
        remember(state, self)

    def _keep(self, known: dict[str, float], batches: Sequence[Mapping[str, Tensor]]) -> Path:
        """Write the batch, all sequences in their order, and what is known of the step."""
        tensors = {
            name: torch.cat([self._gather(batch[name]) for batch in batches]).cpu()
            for name in ("input_ids", "labels")
        }
        path = self.folder / FOLDER / f"step-{known['step']}.safetensors"
        if self._is_writer:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            save_file(tensors, partial, {name: repr(value) for name, value in known.items()})
            os.replace(partial, path)
        return path
