"""A budget of time instead of steps, and a learning-rate schedule that follows it."""

import time
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    SchedulerType,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_scheduler,
)
from transformers.trainer_callback import ExportableState

from calm.errors import UserError
from calm.training.monitoring.metrics import recall, remember

__all__ = ["RunLimit", "TrainingClock", "check_schedule", "timed_schedule"]

UNBOUNDED_STEPS = 10**9
RESOLUTION = 10_000  # virtual steps into which a schedule by time is cut


class RunLimit(TrainerCallback):
    """Ends a run before its last step. One that has ended stays so when it is started again."""

    @property
    def is_over(self) -> bool:
        """Whether the run has come to its end."""
        raise NotImplementedError

    def resume(self, state: TrainerState) -> None:
        """Take over what `state` of a checkpoint has recorded."""
        raise NotImplementedError

    @staticmethod
    def end_run(args: TrainingArguments, control: TrainerControl) -> None:
        """After this step, with an evaluation and a checkpoint where the run has such."""
        control.should_training_stop = True
        control.should_evaluate = args.eval_strategy != "no"
        control.should_save = args.save_strategy != "no"


class TrainingClock(RunLimit, ExportableState):
    """Adds up the seconds spent in training steps and ends the run when they reach the budget.

    Evaluation and saving do not count. Every checkpoint holds the sum, so a resumed run has the
    rest of the budget.

    Args:
        budget: seconds.
        elapsed: seconds already spent.
    """

    def __init__(self, budget: float, elapsed: float = 0.0) -> None:
        self.budget = budget
        self.elapsed = elapsed
        self._began = 0.0

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, 0 to 1."""
        return min(1.0, self.elapsed / self.budget)

    @property
    def is_over(self) -> bool:
        """Whether the budget is spent."""
        return self.elapsed >= self.budget

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {"budget": self.budget, "elapsed": self.elapsed}, "attributes": {}}

    def resume(self, state: TrainerState) -> None:
        """Take over the seconds that `state` has recorded, if any."""
        if kept := recall(state, self):
            self.elapsed = kept["elapsed"]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A run that counted steps alone may go on by time."""
        remember(state, self)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start counting."""
        self._began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop counting. Once time is over, end the run with a log, evaluation and checkpoint."""
        self.elapsed += time.perf_counter() - self._began
        if args.world_size > 1:  # all processes take the time of the first
            shared = torch.tensor([self.elapsed], dtype=torch.float64, device=args.device)
            dist.broadcast(shared, src=0)
            self.elapsed = shared.item()
        if self.is_over:
            control.should_log = True
            self.end_run(args, control)


def timed_schedule(optimizer: Optimizer, args: TrainingArguments, clock: TrainingClock) -> LambdaLR:
    """Transformers' schedule `args.lr_scheduler_type` as a function of the time that is spent.

    Warm-up counts steps, or is a share of the time where ``warmup_steps`` lies below 1.

    Raises:
        UserError: the schedule is not a function of progress.
    """
    # On an optimizer that is never used: only the shape of the schedule is needed.
    placeholder = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    options: Any = args.lr_scheduler_kwargs
    shape = get_scheduler(
        args.lr_scheduler_type,
        placeholder,
        num_warmup_steps=0,
        num_training_steps=RESOLUTION,
        scheduler_specific_kwargs=options,
    )
    if not isinstance(shape, LambdaLR):
        raise UserError(
            f"lr_scheduler_type={args.lr_scheduler_type} cannot follow max_train_seconds; take "
            "linear, cosine or constant"
        )
    decay = shape.lr_lambdas[0]

    def factor(step: int) -> float:
        progress = clock.progress
        by_time = 0 < args.warmup_steps < 1
        warmed = progress / args.warmup_steps if by_time else (step + 1) / max(1, args.warmup_steps)
        return min(1.0, warmed) * decay(int(progress * RESOLUTION))

    return LambdaLR(optimizer, factor)


def check_schedule(training: TrainingArguments) -> None:
    """The schedule exists and takes the arguments that are given for it.

    Raises:
        UserError: it does not.
    """
    kwargs = training.lr_scheduler_kwargs
    if not isinstance(kwargs, dict | None):
        raise UserError(f'lr_scheduler_kwargs must be JSON such as {{"power": 2}}, got {kwargs!r}')
    name = SchedulerType(training.lr_scheduler_type)
    placeholder = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    try:
        get_scheduler(
            name,
            placeholder,
            num_warmup_steps=1,
            num_training_steps=2,
            scheduler_specific_kwargs=kwargs,
        )
    except (TypeError, ValueError) as error:
        raise UserError(
            f"lr_scheduler_kwargs: wrong for lr_scheduler_type={name.value} ({error})"
        ) from error
