"""Where BrierLM of the demo's CALM is lost: the three numbers of `calm experiment gap`, roughly."""

from dataclasses import dataclass, replace
from typing import Any

from calm.errors import UserError
from calm.evaluation.paired import PairedDifference
from calm.evaluation.scores import score_text
from calm.experiments.gap_losses import losses_of
from calm.experiments.gap_measures import QUICK, Probe
from calm.training.trainer import CALMTrainer

__all__ = ["DemoGap", "measure_demo_gap"]

BLOCKS = 60  # held-out blocks that are scored
BATCH = 16
WHOLE = 8.0  # minutes of a demo in which the readout gets all its steps
FEWEST = 20  # steps of the readout


@dataclass(frozen=True)
class DemoGap:
    """Losses of BrierLM: each a value with its 95 % interval, or why there is none.

    Attributes:
        trunk: baseline minus a readout of CALM's hidden states.
        head: the readout minus CALM's draws.
        dispersion: what another ``noise_spread`` wins back.
        note: why the three are missing; else empty.
    """

    trunk: tuple[float, float, float] | None = None
    head: tuple[float, float, float] | None = None
    dispersion: tuple[float, float, float] | None = None
    note: str = ""


def measure_demo_gap(calm: CALMTrainer, baseline: CALMTrainer, minutes: float) -> DemoGap:
    """Of the two trained models, on the first held-out blocks; a short demo's readout learns less.

    A text too small to measure on gives the reason instead.
    """
    options = replace(QUICK, steps=max(FEWEST, round(min(1.0, minutes / WHOLE) * QUICK.steps)))
    try:
        scores = score_text(baseline.model.eval(), _first(baseline), batch_size=BATCH)
        model: Any = calm.model.eval()
        losses = losses_of(Probe(model, _first(calm), calm.train_dataset, options), scores)
    except UserError as error:
        return DemoGap(note=str(error))
    return DemoGap(
        None if losses.trunk is None else _brier_lm(losses.trunk),
        _brier_lm(losses.head),
        _brier_lm(losses.dispersion.gain),
    )


def _first(trainer: CALMTrainer) -> list[Any]:
    blocks: Any = trainer.eval_dataset
    return [blocks[index] for index in range(min(BLOCKS, len(blocks)))]


def _brier_lm(found: PairedDifference) -> tuple[float, float, float]:
    return (found.difference["brier_lm"], *found.interval["brier_lm"])
