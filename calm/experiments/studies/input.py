"""What the backbone reads of a chunk: its tokens, its latent, or both (paper, table 5)."""

from calm.experiments.experiment import BRIER_COLUMNS, Cell, Claim, Experiment, Panel
from calm.experiments.scales import Scale

__all__ = ["INPUT"]

INPUTS = ("tokens", "latent", "both")


def _cells(scale: Scale, seed: int) -> list[Cell]:
    return [
        Cell({"input": kind}, scale.calm(seed, config_overrides={"input_type": kind}), seed=seed)
        for kind in INPUTS
    ]


def _claims(scale: Scale) -> list[Claim]:
    return [
        Claim("table 5", f"{better} are better input than {worse}", {"input": better},
              {"input": worse}, ("brier1", "brier2", "energy"))
        for better, worse in (("tokens", "latent"), ("tokens", "both"), ("both", "latent"))
    ]  # fmt: skip


INPUT = Experiment(
    name="input",
    question="Should the backbone read the tokens of a chunk, its latent, or both?",
    cells=_cells,
    columns=("training_flops", *BRIER_COLUMNS, "held-out/energy"),
    panels=lambda scale: [Panel("Input", "input", "held-out/brier1")],
    claims=_claims,
    notes="All arms share one autoencoder, so that their energy scores compare. As in table 5 they "
    "have equal steps; training FLOPs differ slightly.",
)
