"""BrierLM against cross-entropy over baseline checkpoints, and against the energy loss for CALM."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from calm.experiments.experiment import Cell, Experiment, Finding, Panel, Result
from calm.experiments.scales import Scale
from calm.experiments.verdicts import verdict_on

__all__ = ["METRIC", "pearson", "spearman"]

# Model -> the loss that its metric is compared with.
LOSSES = {"baseline": "held-out/bits_per_token", "CALM": "held-out/energy"}
CLAIMS = {
    "baseline": ("figure 3", "BrierLM falls nearly linearly as the baseline's cross-entropy grows"),
    "CALM": ("users' question", "BrierLM follows the energy score of a CALM as closely"),
}
STRONG, WEAK = -0.9, -0.5  # a correlation up to the first agrees, from the second disagrees
FEWEST = 3  # checkpoints of a correlation


def _cells(scale: Scale, seed: int) -> list[Cell]:
    cells = []
    for size, calm, baseline in scale.grid.sizes[:2]:
        step = scale.grid.checkpoint_steps
        every: dict[str, Any] = {
            "save_strategy": "steps",
            "save_steps": step,
            "save_total_limit": "",
        }
        models = {
            "baseline": scale.baseline(seed, config_overrides=baseline, **every),
            "CALM": scale.calm(seed, config_overrides=calm, **every),
        }
        for name, training in models.items():
            last = int(training.flags["max_steps"])
            for at in range(step, last + 1, step):
                labels = {"model": name, "size": size, "step": at}
                cells.append(Cell(labels, training, options={"checkpoint": at}, seed=seed))
    return cells


class Correlation(NamedTuple):
    """Between BrierLM and the loss of a model, over checkpoints with BrierLM above 0."""

    checkpoints: int
    pearson: float
    spearman: float


def correlation(results: Sequence[Result], model: str) -> Correlation | None:
    """That of all checkpoints of `model`; None if fewer than three have BrierLM above 0."""
    points = [
        (result.values[LOSSES[model]], result.values["held-out/brier_lm"])
        for result in results
        if result.labels["model"] == model and result.values["held-out/brier_lm"] > 0
    ]
    if len(points) < FEWEST:
        return None
    x, y = np.array(points).T
    return Correlation(len(points), pearson(x, y), spearman(x, y))


def _findings(results: Sequence[Result]) -> list[Finding]:
    rows = []
    for model, (source, claim) in CLAIMS.items():
        if (found := correlation(results, model)) is None:
            continue
        strongest = max(found.pearson, found.spearman)  # closest to no relation, or against it
        sign = int(strongest <= STRONG) - int(strongest >= WEAK)
        evidence = (
            f"Pearson {found.pearson:.3f}, Spearman {found.spearman:.3f} over {found.checkpoints} "
            f"checkpoints (agrees up to {STRONG}, disagrees from {WEAK})"
        )
        rows.append(Finding(source, claim, verdict_on([sign]), evidence))
    return rows


def _correlations(results: Sequence[Result]) -> str:
    lines = ["| model | checkpoints | Pearson | Spearman | published |", "|---|---|---|---|---|"]
    published = {"baseline": "-0.966, -0.991 (figure 3)", "CALM": "not published"}
    for model, loss in LOSSES.items():
        found = correlation(results, model)
        shown = (
            f"{found.checkpoints} | {found.pearson:.3f} | {found.spearman:.3f}"
            if found
            else f"fewer than {FEWEST} with BrierLM above 0 | | "
        )
        name = loss.rpartition("/")[2].replace("_", " ")
        lines.append(f"| {model}, {name} | {shown} | {published[model]} |")
    return "\n".join(lines)


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Linear correlation of two samples."""
    return float(np.corrcoef(x, y)[0, 1])


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Correlation of ranks; ties share their mean rank."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


METRIC = Experiment(
    name="metric",
    question="Does BrierLM rank models as their losses do?",
    cells=_cells,
    columns=("held-out/bits_per_token", "held-out/energy", "held-out/brier_lm", "held-out/brier1"),
    panels=lambda scale: [
        Panel("Token baseline", "held-out/bits_per_token", "held-out/brier_lm", line="size",
              where=[{"model": "baseline"}], note="BrierLM over cross-entropy, bits a token"),
        Panel("CALM", "held-out/energy", "held-out/brier_lm", line="size",
              where=[{"model": "CALM"}], note="BrierLM over the held-out energy score"),
    ],
    findings=_findings,
    analysis=_correlations,
    notes="Checkpoints of a size are points of one run, whose learning rate falls in it if the "
    "recipe's does; correlations pool sizes and seeds, and skip checkpoints with BrierLM 0.",
)  # fmt: skip
