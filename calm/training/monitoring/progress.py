"""What a run prints: a bar with the time that is left, and each log as one line to read.

step 1200 of 10000 · loss 3.214 · grad_norm 0.71 · learning_rate 0.0003 · fidelity 5.12 ·
diversity 1.906 · spread_ratio 0.7445 · 12,300 tokens/s · MFU 41.2 % · 37.10 GiB · epoch 0.4 ·
data 0.4 %, forward 31.0 %, backward 59.6 %, optimizer 9.0 % · 1.2 hours left
"""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from calm.training.monitoring.clock import UNBOUNDED_STEPS, TrainingClock
from calm.training.monitoring.speed import PARTS
from calm.units import duration

__all__ = ["LogLines", "ProgressBar", "log_line", "print_lines", "print_saved"]

SHARES = {f"{part}_share": part for part in PARTS}  # of a step's time
UNITS = {  # of an entry: what it is multiplied by, and how it reads
    "tokens_per_second": (1, "{:,.0f} tokens/s"),
    "characters_per_second": (1, "{:,.0f} characters/s"),
    "mfu": (100, "MFU {:.1f} %"),
    "peak_memory_bytes": (2**-30, "{:.2f} GiB"),
}


def log_line(logs: Mapping[str, Any], state: TrainerState, seconds_left: float | None) -> str:
    """A log, with the step and, before the last one, the time that is left."""
    of_all = f" of {state.max_steps}" if 0 < state.max_steps < UNBOUNDED_STEPS else ""
    parts = [f"step {state.global_step}{of_all}", *_entries(logs)]
    if seconds_left:
        parts.append(f"{duration(seconds_left)} left")
    return " · ".join(parts)


def _entries(logs: Mapping[str, Any]) -> Iterator[str]:
    for name, value in logs.items():
        if name in UNITS:
            factor, text = UNITS[name]
            yield text.format(factor * value)
        elif name not in SHARES and name != "total_flos":
            yield f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
    if shares := {part: logs[name] for name, part in SHARES.items() if name in logs}:
        yield ", ".join(f"{part} {100 * share:.1f} %" for part, share in shares.items())


class _Pace:
    """How long a run still takes, at the pace that it has had since it was started."""

    def __init__(self, clock: TrainingClock | None) -> None:
        self._clock = clock
        self._since: tuple[float, int] | None = None

    def start(self, state: TrainerState) -> None:
        self._since = time.perf_counter(), state.global_step

    def seconds_left(self, state: TrainerState) -> float | None:
        """None before the first step, and in an evaluation alone."""
        if self._since is None:
            return None
        if self._clock is not None:
            return max(0.0, self._clock.budget - self._clock.elapsed)
        began, first = self._since
        steps = state.global_step - first
        if steps <= 0:
            return None
        return (time.perf_counter() - began) / steps * (state.max_steps - state.global_step)


class _Lines(TrainerCallback):
    """Writes each log as a line.

    Args:
        clock: of a run by time.
    """

    def __init__(self, clock: TrainingClock | None = None) -> None:
        super().__init__()
        self._clock, self._pace = clock, _Pace(clock)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the time from here."""
        self._pace.start(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the log."""
        self._write(log_line(logs or {}, state, self._pace.seconds_left(state)), state)

    def _write(self, line: str, state: TrainerState) -> None:
        raise NotImplementedError


class ProgressBar(_Lines, ProgressCallback):
    """transformers' bar, whose estimate counts the steps of this start alone; logs above it.

    Of a run by time the bar ends at the step where its time is likely to be over.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar from the step at which the run goes on."""
        super().on_train_begin(args, state, control, **kwargs)
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, dynamic_ncols=True
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance the bar, and put its end where the time will be over."""
        super().on_step_end(args, state, control, **kwargs)
        if self.training_bar is not None and self._clock is not None:
            expected = state.global_step / max(self._clock.progress, 1e-9)
            self.training_bar.total = max(state.global_step, round(expected))

    def _write(self, line: str, state: TrainerState) -> None:
        if self.training_bar is not None:
            self.training_bar.write(line)


class LogLines(_Lines, PrinterCallback):
    """Prints the logs; where there is no bar."""

    def _write(self, line: str, state: TrainerState) -> None:
        if state.is_local_process_zero:
            print(line, flush=True)  # noqa: T201 (its purpose)


def print_saved(folder: Path) -> None:
    """Say where the finished model is."""
    print(f"saved in {folder}", flush=True)  # noqa: T201 (its purpose)


def print_lines(trainer: Trainer, clock: TrainingClock | None) -> None:
    """Put `ProgressBar` or `LogLines` in place of what transformers gave `trainer`."""
    for theirs, own in ((ProgressCallback, ProgressBar), (PrinterCallback, LogLines)):
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback) is theirs:
                trainer.remove_callback(callback)
                trainer.add_callback(own(clock))
