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
    cells += [_cell(scale, seed, PUBLISHED, {"kl_weight": w}) for w in scale.grid.kl_weights]
    cells += [_cell(scale, seed, PUBLISHED, {"latent_size": n}) for n in scale.grid.latent_sizes]
    return cells


def _cell(scale: Scale, seed: int, name: str, overrides: dict[str, Any]) -> Cell:
    autoencoder = scale.autoencoder(seed, config_overrides=overrides)
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
    reference = _labels(scale)
    claims += [
        Claim("figure 6", f"KL weight {reference['KL weight']:g} is better than {weight:g}",
              reference, _labels(scale, kl_weight=weight))
        for weight in scale.grid.kl_weights
    ]  # fmt: skip
    claims += [
        Claim("figure 7", f"latent size {reference['latent size']} is better than {size}",
              reference, _labels(scale, latent_size=size))
        for size in scale.grid.latent_sizes
    ]  # fmt: skip
    return claims


def _panels(scale: Scale) -> list[Panel]:
    reference = _labels(scale)
    table2 = [_labels(scale, name) for name in REGULARISATION]
    by_weight = [{name: reference[name] for name in ("regularisation", "latent size")}]
    by_size = [{name: reference[name] for name in ("regularisation", "KL weight")}]
    score, note = "held-out/brier1", "downstream, of the language model"
    return [
        Panel("Regularisation", "regularisation", score, where=table2, note=note),
        Panel("KL weight", "KL weight", score, where=by_weight, log_x=True, note=note),
        Panel("Latent size", "latent size", score, where=by_size, log_x=True, note=note),
        Panel("Latent noise", "noise", "accuracy", line="regularisation", where=table2,
              is_curve=True, note="reconstruction from latents with noise"),
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
    notes="Every seed trains an autoencoder of its own. Table 2's rows with one dropout are read "
    "as token dropout alone and latent dropout alone. The reference's KL weight and latent size "
    "are the recipe's, published are 0.001 and 128; figure 7's grid of dropouts for each latent "
    "size is not run.",
)  # fmt: skip
