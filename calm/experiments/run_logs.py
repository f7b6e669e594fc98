"""The logs that training runs leave, over steps, tokens, operations or seconds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from calm.configuration import model_kind
from calm.errors import UserError
from calm.flops import flops_of
from calm.plan import saved_model
from calm.training.checkpoints.complete import checkpoint_folders
from calm.training.checkpoints.resume import read_protocol, read_record

__all__ = ["AXES", "RunLog", "Series", "read_run", "tokens_per_step"]

STATE = "trainer_state.json"
AXES = {  # of a figure: what they say
    "steps": "optimizer steps",
    "tokens": "tokens",
    "flops": "training FLOPs",
    "seconds": "seconds, evaluation and saving included",
}


class Series(NamedTuple):
    """What a run has logged under one name.

    Attributes:
        x: places on the axis.
        y: values.
        errors: standard errors of them; None where none were logged.
    """

    x: list[float]
    y: list[float]
    errors: list[float] | None


@dataclass(frozen=True)
class RunLog:
    """The log of a training run.

    Attributes:
        name: of the run, for figures and errors.
        folder: where its newest state is: its own, or that of a checkpoint.
        logs: entries, each with ``step``.
        protocol: settings of the run; empty where it left none.
    """

    name: str
    folder: Path
    logs: Sequence[dict[str, Any]]
    protocol: dict[str, Any]

    @property
    def names(self) -> list[str]:
        """Everything that was logged, in the order of its first entry."""
        return list(dict.fromkeys(name for entry in self.logs for name in entry))

    def series(self, name: str, axis: str) -> Series:
        """What was logged under `name`, over one of `AXES`.

        Raises:
            UserError: the run does not say what the axis needs.
        """
        entries = [entry for entry in self.logs if name in entry]
        errors = [entry[f"{name}_se"] for entry in entries if f"{name}_se" in entry]
        return Series(
            self._places([entry["step"] for entry in entries], axis),
            [entry[name] for entry in entries],
            errors if errors and len(errors) == len(entries) else None,
        )

    def _places(self, steps: list[int], axis: str) -> list[float]:
        if axis == "steps":
            return [float(step) for step in steps]
        if axis == "tokens":
            return [float(step * self._tokens_per_step) for step in steps]
        if axis == "flops":
            factor = self._tokens_per_step * self._flops_per_token
            return [step * factor for step in steps]
        known, passed = self._seconds
        return [float(second) for second in np.interp(steps, known, passed)]

    @cached_property
    def _tokens_per_step(self) -> int:
        found = tokens_per_step(self.protocol)
        if any("sequences_per_step" in change for change in self.protocol.get("changes", [])):
            raise UserError(f"--x: the batch of {self.name} was changed on the way; take --x steps")
        if found is None:
            raise UserError(
                f"--x: {self.name} has no protocol.json with its batch; only --x steps is known"
            )
        return found

    @cached_property
    def _flops_per_token(self) -> float:
        """Operations to learn from a token, by `calm.flops`."""
        if "options" in self.protocol:
            raise UserError(
                f"--x flops: the operations of the stage {self.protocol['stage']} of {self.name} "
                "are not known; take --x tokens"
            )
        model = saved_model(self.folder, model_kind(read_record(self.folder, "config.json")))
        chunk = getattr(model.config, "patch_size", 1)
        return flops_of(model, self.protocol["block_size"] // chunk).training()

    @cached_property
    def _seconds(self) -> tuple[list[int], list[float]]:
        """Steps of the logs, and the seconds until each, from the tokens a second of each."""
        steps, passed = [0], [0.0]
        for entry in self.logs:
            if "tokens_per_second" in entry:
                tokens = (entry["step"] - steps[-1]) * self._tokens_per_step
                passed.append(passed[-1] + tokens / entry["tokens_per_second"])
                steps.append(entry["step"])
        if len(steps) == 1:
            raise UserError(f"--x seconds: {self.name} has logged no tokens_per_second")
        return steps, passed


def read_run(folder: Path) -> RunLog:
    """The newest log of the run in `folder`: of its end, or of its last checkpoint.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    states = {place: read_record(place, STATE) for place in (folder, *checkpoint_folders(folder))}
    newest = max(states, key=lambda place: states[place].get("global_step", -1))
    logs = states[newest].get("log_history")
    if not logs:
        raise UserError(
            f"RUN: {folder} holds no log of a training ({STATE}, which a run writes with its "
            "checkpoints and at its end)"
        )
    return RunLog(str(folder), newest, logs, read_protocol(newest))


def tokens_per_step(protocol: dict[str, Any]) -> int | None:
    """Tokens of an optimizer step of a run with this protocol; None where it does not say."""
    training = protocol.get("training", {})
    split = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
    factors = [protocol.get("block_size"), *(training.get(name) for name in split)]
    return math.prod(factors) if all(isinstance(factor, int) for factor in factors) else None
