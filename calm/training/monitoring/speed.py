"""How fast a run is, and where the time of its steps goes."""

import logging
import time
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from calm.flops import flops_of, peak_of
from calm.memory import peak_memory

__all__ = ["Speed", "StepTimer"]

logger = logging.getLogger(__name__)

PARTS = ("data", "forward", "backward", "optimizer")
BETWEEN = "between steps"  # logs, evaluations, checkpoints
MOST_MARKS = 1024  # that wait to be added up; the device is never so many behind


class StepTimer:
    """Time by the part of a step that it went to.

    A mark ends a part. On a GPU marks are events in its queue: what counts is when the GPU came
    there, so that a wait for data is what it stood idle for, and no mark waits for the GPU. They
    are read by `drain`; of `MOST_MARKS` the older half is read before, so that a run without logs
    holds no more.

    Args:
        device: where training runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_queued = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self._seconds: dict[str, float] = {}

    def mark(self, part: str) -> None:
        """The time since the last mark was that of `part`."""
        if self._is_queued:
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((part, now))
        if len(self._marks) >= MOST_MARKS:
            self._add_up(MOST_MARKS // 2)

    def drain(self) -> dict[str, float]:
        """Seconds of each part since the last call."""
        if self._marks:
            self._add_up(len(self._marks))
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _add_up(self, count: int) -> None:
        """Add up what passed between the first `count` marks; the last of them begins the rest."""
        marks, self._marks = self._marks[:count], self._marks[count - 1 :]
        if self._is_queued:
            marks[-1][1].synchronize()
        for (_, before), (part, now) in pairwise(marks):
            passed = before.elapsed_time(now) / 1e3 if self._is_queued else now - before
            self._seconds[part] = self._seconds.get(part, 0.0) + passed


class Speed(TrainerCallback):
    """What a log says of speed: tokens a second, use of the device, memory, shares of the time.

    ``tokens_per_second`` and ``characters_per_second`` are those of all processes between two logs,
    evaluation and saving included. ``mfu`` is the share of the device's peak (dense bfloat16,
    `calm.flops.peak_of`) that the operations of training take while steps run; it is left out where
    the peak or the operations are not known, as in stages with an objective of their own, or of
    another head than those of calm, of which a warning tells once.
    ``peak_memory_bytes`` is the most that this process has held so far: of the GPU what torch has
    allocated, on a CPU all of it. ``data_share``, ``forward_share``, ``backward_share`` and
    ``optimizer_share`` add up to 1: data is waiting for a batch and moving it, optimizer is also
    clipping.

    Args:
        model: that learns.
        args: of the run.
        tokens_per_character: for characters/s, which are left out if it is None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        tokens_per_character: float | None = None,
    ) -> None:
        self.tokens_per_character = tokens_per_character
        self._model, self._args = model, args
        self._timer = StepTimer(args.device)
        self._peak = peak_of(args.device)
        self._flops: dict[int, float] = {}
        self.start()

    def start(self) -> None:
        """Start an interval."""
        self._tokens, self._operations = 0, 0.0
        self._since = time.perf_counter()

    def mark(self, part: str) -> None:
        """The time since the last mark went to `part`, one of `PARTS`, or `BETWEEN` steps."""
        self._timer.mark(part)

    def add(self, input_ids: Tensor) -> None:
        """Count the tokens of a micro-batch; the other processes have as many."""
        tokens, length = input_ids.numel(), input_ids.shape[1]
        self._tokens += tokens * self._args.world_size
        if self._peak is None or getattr(self._model, "objective", None) is not None:
            return
        if length not in self._flops:
            self._flops[length] = self._flops_of_token(length)
        self._operations += tokens * self._flops[length]

    def _flops_of_token(self, length: int) -> float:
        """Operations to learn from a token of a sequence so long; 0 if they are not known."""
        try:
            context = length // getattr(self._model, "patch_size", 1)
            return flops_of(self._model, context).training()
        except Exception as error:  # of any model that is not ours: a log ends no run
            logger.warning("logs have no mfu: %s", error)
            self._peak = None
            return 0.0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The update has been made."""
        self.mark("optimizer")

    def drain(self) -> dict[str, float]:
        """Figures of the interval. The next interval starts."""
        passed = max(time.perf_counter() - self._since, 1e-9)
        figures = {"tokens_per_second": self._tokens / passed}
        if self.tokens_per_character:
            figures["characters_per_second"] = (
                figures["tokens_per_second"] / self.tokens_per_character
            )
        seconds = self._timer.drain()
        of_steps = sum(seconds.get(part, 0.0) for part in PARTS)
        if self._peak and self._operations and of_steps:
            figures["mfu"] = self._operations / (of_steps * self._peak)
        if memory := peak_memory(self._args.device):
            figures["peak_memory_bytes"] = memory
        if of_steps:
            figures |= {f"{part}_share": seconds.get(part, 0.0) / of_steps for part in PARTS}
        self.start()
        return figures
