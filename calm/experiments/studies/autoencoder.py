"""Regularisation and latent size of the autoencoder (paper, table 2, figures 6 and 7)."""

from typing import Any

from calm.experiments.experiment import BRIER_COLUMNS, Cell, Claim, Experiment, Panel
from calm.experiments.scales import Scale

__all__ = ["AUTOENCODER"]

DROPOUT = 0.15
# Table 2 of the paper, from nothing to all of it.
REGULARISATION: dict[str, dict[str, Any]] = {
    "none": {"kl_weight": 0, "kl_clamp": 0, "ae_dropout": 0},
    "KL": {"kl_clamp": 0, "ae_dropout": 0},
    "KL with floor": {"ae_dropout": 0},
    "and token dropout": {"token_dropout": DROPOUT, "latent_dropout": 0},
    "and latent dropout": {"token_dropout": 0, "latent_dropout": DROPOUT},
    "and both": {},
}
PUBLISHED = "and both"


def _cells(scale: Scale, seed: int) -> list[Cell]:
    cells = [_cell(scale, seed, name, overrides) for name, overrides in REGULARISATION.items()]
    cells += [
        _cell(scale, seed, PUBLISHED, {"kl_weight": weight}) for weight in scale.grid["kl_weights"]
    ]
    cells += [
        _cell(scale, seed, PUBLISHED, {"latent_size": size}) for size in scale.grid["latent_sizes"]
    ]
    return cells


def _cell(scale: Scale, seed: int, name: str, overrides: dict[str, Any]) -> Cell:
    autoencoder = scale.autoencoder(config_overrides=overrides)
    fields = autoencoder.flags["config_overrides"]
    labels = {
        "regularisation": name,
        "KL weight": float(overrides.get("kl_weight", fields.get("kl_weight", 1e-3))),
        "latent size": int(fields.get("latent_size", 128)),
    }
    return Cell(labels, scale.calm(seed, autoencoder), "latent_space", seed=seed)


def _labels(scale: Scale, name: str = PUBLISHED, **changed: Any) -> dict[str, Any]:
    return {**_cell(scale, 1, name, {**REGULARISATION[name], **changed}).labels}


def _claims(scale: Scale) -> list[Claim]:
    order = (
        ("KL with floor", "none"), ("none", "KL"), ("and token dropout", "KL with floor"),
        ("and latent dropout", "KL with floor"), (PUBLISHED, "and token dropout"),
        (PUBLISHED, "and latent dropout"),
    )  # fmt: skip
    claims = [
        Claim("table 2", f"{better!r} is better than {worse!r}", _labels(scale, better),
              _labels(scale, worse))
        for better, worse in order
    ]  # fmt: skip
    claims += [
        Claim("figure 6", f"the published KL weight is better than {weight:g}", _labels(scale),
              _labels(scale, kl_weight=weight))
        for weight in scale.grid["kl_weights"]
    ]  # fmt: skip
    claims += [
        Claim("figure 7", f"the reference's latent size is better than {size}", _labels(scale),
              _labels(scale, latent_size=size))
        for size in scale.grid["latent_sizes"]
    ]  # fmt: skip
    return claims


def _panels(scale: Scale) -> list[Panel]:
    reference = _labels(scale)
    by_weight = {name: reference[name] for name in ("regularisation", "latent size")}
    by_size = {name: reference[name] for name in ("regularisation", "KL weight")}
    return [
        Panel("Regularisation", "regularisation", "held-out/brier1", note="Brier-1 downstream"),
        Panel("KL weight", "KL weight", "held-out/brier1", where=by_weight,
              note="Brier-1 downstream"),
        Panel("Latent size", "latent size", "held-out/brier1", where=by_size,
              note="Brier-1 downstream"),
        Panel("Latent noise", "noise", "accuracy", line="regularisation", is_curve=True,
              note="share of bytes reconstructed over added latent noise"),
    ]  # fmt: skip


AUTOENCODER = Experiment(
    name="autoencoder",
    question="What must an autoencoder be like for the language model on it to be good?",
    cells=_cells,
    columns=(
        "held-out/reconstruction", "held-out/reconstruction_noisy", "held-out/collapsed",
        "held-out/posterior_std", "held-out/excess", *BRIER_COLUMNS, "held-out/brier1_noisy",
    ),
    panels=_panels,
    claims=_claims,
)  # fmt: skip
