"""The same checkpoints on prose, documentation and code."""

from calm.experiments.experiment import Cell, Experiment, Panel
from calm.experiments.scales import Scale

__all__ = ["DOMAINS"]

TEXTS = {"prose": "embedded:topics", "code": "embedded:sources"}
NAMES = ("held-out", *TEXTS)


def _cells(scale: Scale, seed: int) -> list[Cell]:
    """A CALM and the baseline at the same training FLOPs."""
    calm = scale.calm(seed)
    models = {
        "CALM": calm,
        "token baseline": scale.at_budget(scale.baseline(seed), scale.flops(calm)),
    }
    return [Cell({"model": name}, training, seed=seed) for name, training in models.items()]


DOMAINS = Experiment(
    name="domains",
    question="Does the order of CALM and baseline depend on the kind of text?",
    cells=_cells,
    columns=tuple(
        f"{name}/{value}"
        for name in NAMES
        for value in ("brier_lm", "brier1", "brier2", "bits_per_token", "energy")
    ),
    panels=lambda scale: [Panel(name.capitalize(), "model", f"{name}/brier1") for name in NAMES],
    notes="Not in the paper. Both models have the same training FLOPs. A CALM is scored where its "
    "chunks start, the baseline at every token: `calm compare` scores both at the positions that "
    "they share.",
    texts=TEXTS,
)
