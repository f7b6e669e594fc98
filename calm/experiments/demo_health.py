"""Health of the demo's CALM: the diagnostics of `calm eval`, and advice where one is bad."""

from dataclasses import dataclass
from typing import Any

from calm.errors import UserError
from calm.evaluation.diagnostics import advice
from calm.evaluation.measures import measure_text
from calm.training.trainer import CALMTrainer

__all__ = ["DemoHealth", "measure_demo_health"]

BLOCKS = 60  # held-out blocks that are measured
BATCH = 16


@dataclass(frozen=True)
class DemoHealth:
    """What is measured of a CALM beside BrierLM.

    Attributes:
        values: see `calm.evaluation.measures.TextMeasures.values`.
        table: the values with their standard errors and what they mean, or why there are none.
        advice: a line for each that is beyond its threshold.
    """

    values: dict[str, float]
    table: str
    advice: list[str]


def measure_demo_health(trainer: CALMTrainer) -> DemoHealth:
    """Of a trained CALM, on the first held-out blocks."""
    blocks: Any = trainer.eval_dataset
    first = [blocks[index] for index in range(min(BLOCKS, len(blocks)))]
    try:
        found = measure_text(trainer.model.eval(), first, batch_size=BATCH)
    except UserError as error:  # a text too small to measure on
        return DemoHealth({}, str(error), [])
    values = found.values()
    return DemoHealth(values, found.to_table(values), advice(values))
