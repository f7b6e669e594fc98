"""The stages of training: the command of each, what it trains, its flags.

A stage after pre-training goes on from a trained CALM, has flags of its own and gives the model an
`calm.models.objective.Objective`. A new one is an entry of `STAGES`, a module of that objective
and its flags (such as `calm.training.objectives.tempering`) and a program (such as
`calm.training.distill_temperature`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from calm.errors import UserError
from calm.training.flags.recipe import Stage
from calm.training.monitoring.clock import RunLimit
from calm.training.objectives.distilling import DistillationArguments
from calm.training.objectives.post_training import PostTrainingArguments, limits
from calm.training.objectives.tempering import TemperingArguments

__all__ = ["STAGES", "StageDescription", "check_source"]


@dataclass(frozen=True)
class StageDescription:
    """A stage.

    Attributes:
        command: of `calm`.
        trained: what it trains, for help.
        block_size: tokens of a block where no flag says otherwise, as in the published scripts.
        options: dataclass of the flags that this stage alone has; None in pre-training.
        limits: of its flags: what ends a run before its last step; None for nothing.
        has_teacher: whether another model, ``teacher_name_or_path``, can be part of it.
    """

    command: str
    trained: str
    block_size: int
    options: Any = None
    limits: Callable[[Any], list[RunLimit]] | None = None
    has_teacher: bool = False


STAGES = {
    Stage.AUTOENCODER: StageDescription("train-ae", "autoencoder", 2048, has_teacher=True),
    Stage.CALM: StageDescription("train", "continuous language model", 8192),
    Stage.BASELINE: StageDescription("train-ar", "token-by-token baseline", 2048),
    Stage.TEMPERATURE: StageDescription(
        "distill-temperature",
        "head that draws at low temperatures in one step",
        8192,
        TemperingArguments,
    ),
    Stage.POST: StageDescription(
        "post-train",
        "head, or a density of its noise, by rewards of its draws",
        8192,
        PostTrainingArguments,
        limits,
    ),
    Stage.DISTILLATION: StageDescription(
        "distill",
        "continuous language model that learns from another model's draws",
        8192,
        DistillationArguments,
        has_teacher=True,
    ),
}


def check_source(model: Any) -> None:
    """The flags `model` name a trained model, and nothing that would describe another one.

    Args:
        model: `calm.training.flags.arguments.ModelArguments` of a stage after pre-training.

    Raises:
        UserError: no trained model, or a description of a new one.
    """
    if not model.model_name_or_path:
        raise UserError(
            "model_name_or_path is needed: the folder of a trained CALM, from which this stage "
            "goes on"
        )
    for name in ("config_overrides", "config_name", "model_type"):
        if value := getattr(model, name):
            raise UserError(
                f"{name} describes a new model; the one at model_name_or_path stays as it is: "
                f"take it out, got {value!r}"
            )
