"""One training stage of the demo: a job with a time budget, a progress bar and a score curve."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from calm.experiments.trained import BUILDERS
from calm.training.flags.arguments import parse_arguments
from calm.training.flags.recipe import Stage
from calm.training.job import prepare_job
from calm.training.monitoring.clock import TrainingClock
from calm.training.trainer import CALMTrainer

__all__ = ["Score", "StageRun", "train_stage"]

Score = Callable[[CALMTrainer], Mapping[str, float]]
SECONDS = "train_seconds"


@dataclass(frozen=True)
class StageRun:
    """Record of one stage; curves are over seconds of training.

    Attributes:
        stage: which one.
        parameters: trained parameters.
        steps: optimiser steps.
        tokens: tokens read.
        seconds: of training steps, without scoring.
        logs: entries of the training log (``train_seconds``, ``loss``, ...).
        scores: held-out scores during training, each with ``train_seconds``.
    """

    stage: Stage
    parameters: int
    steps: int
    tokens: int
    seconds: float
    logs: list[dict[str, float]] = field(repr=False)
    scores: list[dict[str, float]] = field(repr=False)

    @property
    def tokens_per_second(self) -> float:
        """Training speed."""
        return self.tokens / self.seconds


def train_stage(
    stage: Stage, argv: Sequence[str], *, title: str, score: Score, num_scores: int
) -> tuple[CALMTrainer, StageRun]:
    """Train a stage for the seconds that its flags give it, and save the model.

    Args:
        stage: which one.
        argv: its flags, with ``--max_train_seconds``.
        title: text before the bar.
        score: held-out scores of the model as it is; the time they take does not count as training.
        num_scores: how often to score, at even intervals of time; the last is at the end.

    Returns: the trainer with the trained model, and the record.
    """
    trainer = prepare_job(parse_arguments(list(argv), stage), BUILDERS[stage])
    clock = trainer.clock
    if clock is None:
        raise ValueError(f"argv must set --max_train_seconds, got {list(argv)}")
    trainer.remove_callback(PrinterCallback)
    curve = _ScoreCurve(clock, lambda: score(trainer), num_scores)
    trainer.add_callback(curve)  # after the clock's callback, which stops the time
    trainer.add_callback(_StageBar(clock, title, curve.scores))
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    blocks: Any = trainer.train_dataset
    steps, batch = trainer.state.global_step, trainer.args.train_batch_size
    run = StageRun(
        stage=stage,
        parameters=sum(weight.numel() for weight in trained),
        steps=steps,
        tokens=steps * batch * blocks.block_size,
        seconds=clock.elapsed,
        logs=_whole_intervals(trainer),
        scores=curve.scores,
    )
    return trainer, run


def _whole_intervals(trainer: CALMTrainer) -> list[dict[str, float]]:
    """The training log without its last entry, a mean over the few steps left at the end."""
    every = trainer.state.logging_steps
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [entry for entry in logs if entry["step"] % every == 0] or logs


class _ScoreCurve(TrainerCallback):
    """Scores the model at even intervals of time."""

    def __init__(
        self, clock: TrainingClock, score: Callable[[], Mapping[str, float]], num_scores: int
    ) -> None:
        self.clock, self.score, self.num_scores = clock, score, num_scores
        self.scores: list[dict[str, float]] = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Score if the next interval has passed."""
        if self.clock.progress * self.num_scores >= len(self.scores) + 1:
            self.scores.append({SECONDS: self.clock.elapsed, **self.score()})


class _StageBar(TrainerCallback):
    """A bar over the seconds of training, with the newest loss and score behind it."""

    def __init__(self, clock: TrainingClock, title: str, scores: list[dict[str, float]]) -> None:
        self.clock, self.title, self.scores = clock, title, scores
        self._loss = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        self.bar = tqdm(
            total=self.clock.budget,
            bar_format=self.title + " {percentage:3.0f}% |{bar:28}| {n:.0f}/{total:.0f} s{postfix}",
            mininterval=0.2 if sys.stderr.isatty() else 15,
        )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: Mapping[str, float] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Remember the loss."""
        self._loss = (logs or {}).get("loss", self._loss)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance the bar."""
        shown = [f"step {state.global_step}", f"loss {self._loss:.3f}"]
        newest = self.scores[-1] if self.scores else {}
        shown += [f"{name} {value:.4g}" for name, value in newest.items() if name != SECONDS][:1]
        self.bar.set_postfix_str(", ".join(shown), refresh=False)
        self.bar.update(min(self.clock.elapsed, self.clock.budget) - self.bar.n)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self.bar.close()
