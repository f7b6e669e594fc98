"""The same checkpoints on prose, documentation and code."""

from calm.experiments.experiment import Cell, Claim, Experiment, Panel
from calm.experiments.scales import Scale

__all__ = ["DOMAINS"]

TEXTS = {"prose": "embedded:topics", "code": "embedded:sources"}
NAMES = ("held-out", *TEXTS)
CALM, BASELINE = "CALM", "token baseline"
EVERY = 8  # tokens between n-grams: places at which both models score one, in any block


def _cells(scale: Scale, seed: int) -> list[Cell]:
    """A CALM and the baseline at the same training FLOPs, scored on the same n-grams."""
    calm = scale.calm(seed, config_overrides={"has_start_patch": False})
    models = {
        CALM: calm,
        BASELINE: scale.at_budget(scale.baseline(seed), scale.flops(calm)),
    }
    return [
        Cell({"model": name}, training, options={"multiples_of": EVERY}, seed=seed)
        for name, training in models.items()
    ]


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
    claims=lambda scale: [
        Claim("table 1", f"on {name} text, a CALM is better than the token baseline for the same "
              "training FLOPs", {"model": CALM}, {"model": BASELINE}, corpus=name)
        for name in NAMES
    ],
    notes="The kinds of text are not in the paper, whose claim is about hundreds of millions of "
    "parameters. Both models have the same training FLOPs, read no start chunks and are scored on "
    f"the same n-grams, which start at every {EVERY}th token.",
    texts=TEXTS,
)  # fmt: skip
