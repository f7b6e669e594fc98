"""What the latent should be like: a sphere, mixed slots, another basis, under noise, aligned."""

from collections.abc import Mapping
from typing import Any

from calm.experiments.experiment import BRIER_COLUMNS, Cell, Claim, Experiment, Panel
from calm.experiments.scales import Scale

__all__ = ["ARMS", "LATENT"]

REFERENCE = "as it is"
_NOISE, _ALIGNED = {"decoder_noise": 0.5}, {"alignment_weight": 0.5}
# Fields of the autoencoder on top of the scale's.
ARMS: dict[str, Mapping[str, Any]] = {
    REFERENCE: {},
    "sphere": {"latent_sphere": True},
    "mixed slots": {"num_mixing_layers": 1},
    "unit variances": {"whitening": "diagonal"},
    "unit covariance": {"whitening": "full"},
    "growing noise": _NOISE,
    "sphere, growing noise": {"latent_sphere": True, **_NOISE},
    "mixed slots, growing noise": {"num_mixing_layers": 1, **_NOISE},
    "aligned": _ALIGNED,
    "mixed slots, aligned": {"num_mixing_layers": 1, **_ALIGNED},
}


def _cells(scale: Scale, seed: int) -> list[Cell]:
    budget = scale.flops(scale.calm())
    cells = []
    for name, fields in ARMS.items():
        teacher = scale.baseline() if "alignment_weight" in fields else None
        autoencoder = scale.autoencoder(seed, teacher, config_overrides=fields)
        training = scale.at_budget(scale.calm(seed, autoencoder), budget)
        cells.append(Cell({"latent": name}, training, "latent_structure", seed=seed))
    return cells


def _claims(scale: Scale) -> list[Claim]:
    return [
        Claim("this package", f"{name} is better than {REFERENCE}", {"latent": name},
              {"latent": REFERENCE})
        for name in ARMS if name != REFERENCE
    ]  # fmt: skip


LATENT = Experiment(
    name="latent",
    question="Which latent of the autoencoder is best for the language model on it?",
    cells=_cells,
    columns=(
        "training_tokens", "held-out/reconstruction", "held-out/reconstruction_noisy",
        "held-out/collapsed", "held-out/additivity", "held-out/changed_token",
        "held-out/neighbours", *BRIER_COLUMNS, "held-out/brier1_noisy",
    ),
    panels=lambda scale: [
        Panel("Latents", "latent", "held-out/brier1", note="equal training FLOPs of the CALM"),
        Panel("Latent noise", "noise", "accuracy", line="latent", is_curve=True,
              note="reconstruction from latents with noise"),
    ],
    claims=_claims,
    notes="Every arm and seed trains an autoencoder of its own, all with the same steps. The CALM "
    "on it has the training FLOPs of the first arm's: a dearer encoder leaves it fewer steps. "
    "The aligned autoencoders have one teacher, the scale's token baseline, whose training and "
    "reading is not in these FLOPs. "
    "Energy scores of different latents have different units and are not compared. docs/latent.md "
    "says what the arms are.",
)  # fmt: skip
