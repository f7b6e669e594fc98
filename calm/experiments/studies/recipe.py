"""What makes a CALM better for the same training FLOPs: training terms, exponent, draws, widths.

Claims are judged on all of the held-out text. Who chooses an arm reads the last table: BrierLM on
the stretches that choose, and on the others, that report.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from calm.evaluation.bootstrap import brier_lm
from calm.experiments.experiment import BRIER_COLUMNS, Cell, Claim, Experiment, Panel, Result
from calm.experiments.scales import Scale
from calm.experiments.verdicts import by_cell, seed_spread, stretches

__all__ = ["ARMS", "RECIPE"]


def _overrides(*fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Flags that set fields of the configuration."""
    return {"config_overrides": {name: value for each in fields for name, value in each.items()}}


REFERENCE, TOKENS = "as it is", "token baseline"
_READOUT = {"token_loss_weight": 0.3}
_SCORE = {"token_score_weight": 1.0, "token_score_start": 0.5}
_ROOT = {"beta": 0.5}  # exponent of the energy score
_ONE_STEP = {"sampling_steps": 1}
_CAUSAL = {**_READOUT, "token_readout": "causal", "keep_token_readout": True}
BEST = "readout, exponent 1/2"
# What is varied on top of it: draws, head, trunk.
_SIZES: dict[str, Mapping[str, Any]] = {
    "N = 2": {"num_samples": 2},
    "N = 8": {"num_samples": 8},
    "head of 1 block": {"num_mlp_layers": 1},
    "head of 1 block, N = 2": {"num_mlp_layers": 1, "num_samples": 2},
    "head of 4 blocks": {"num_mlp_layers": 4},
    "noise of width 128": {"noise_size": 128},
    "trunk of 5 layers": {"num_hidden_layers": 5},
    "trunk of 5 layers, N = 2": {"num_hidden_layers": 5, "num_samples": 2},
}
# Flags on top of the scale's CALM.
ARMS: dict[str, Mapping[str, Any]] = {
    REFERENCE: {},
    "readout": _overrides(_READOUT),
    "readout, token score": _overrides(_READOUT, _SCORE),
    "slot-causal readout, N = 2": _overrides(_CAUSAL, {"token_loss_weight": 1.0, "num_samples": 2}),
    "slot-causal readout, exponent 1/2": _overrides(_CAUSAL, _ROOT),
    "flow head, one step": {"model_type": "flow", **_overrides(_ONE_STEP)},
    "flow head, one step, readout": {"model_type": "flow", **_overrides(_ONE_STEP, _READOUT)},
    BEST: _overrides(_READOUT, _ROOT),
    "readout, token score, exponent 1/2": _overrides(_READOUT, _SCORE, _ROOT),
    "readout, token score, N = 2": _overrides(_READOUT, _SCORE, {"num_samples": 2}),
    **{f"{BEST}, {name}": _overrides(_READOUT, _ROOT, size) for name, size in _SIZES.items()},
}
# Arms whose readout is saved. Its own draws are a row of the same model; not likelihood-free.
DRAWN_BY_READOUT = {
    "slot-causal readout, N = 2": "draws of the slot-causal readout",
    "slot-causal readout, exponent 1/2": "draws of the slot-causal readout, exponent 1/2",
}


def _cells(scale: Scale, seed: int) -> list[Cell]:
    budget = scale.flops(scale.calm())
    models = {TOKENS: scale.baseline(seed)}
    models |= {name: scale.calm(seed, **flags) for name, flags in ARMS.items()}
    models = {name: scale.at_budget(training, budget) for name, training in models.items()}
    cells = [Cell({"recipe": name}, training, seed=seed) for name, training in models.items()]
    return cells + [
        Cell({"recipe": name}, models[arm], options={"method": "readout"}, seed=seed)
        for arm, name in DRAWN_BY_READOUT.items()
    ]


def _claims(scale: Scale) -> list[Claim]:
    return [
        Claim("this package", f"{name} is better than {REFERENCE}", {"recipe": name},
              {"recipe": REFERENCE})
        for name in (*ARMS, *DRAWN_BY_READOUT.values()) if name != REFERENCE
    ]  # fmt: skip


def _halves(results: Sequence[Result]) -> str:
    """BrierLM of each arm on the stretches that choose, and on those that report."""
    orders = ("brier1", "brier2", "brier3", "brier4")
    errors = [seed_spread(results, order).variance ** 0.5 for order in orders]
    lines = ["| recipe | seeds | BrierLM, choosing | BrierLM, reporting |", "|---|---|---|---|"]
    for cell in by_cell(results):
        tables = [stretches(result, "held-out/brier") for result in cell]
        scores = (_brier_lm([table[half::2] for table in tables]) for half in (0, 1))
        shown = " | ".join(f"{score:.2f}" for score in scores)
        lines.append(f"| {cell[0].labels['recipe']} | {len(cell)} | {shown} |")
    spread = ", ".join(f"{100 * error:.2f}" for error in errors)
    return "\n".join(lines) + (
        f"\n\nStandard deviation of Brier-1 to Brier-4 between seeds, points: {spread}."
        if any(errors)
        else ""
    )


def _brier_lm(tables: Sequence[Tensor]) -> float:
    """Mean over seeds of BrierLM of ``[sum, ..., count]`` rows."""
    sums = torch.stack([table.sum(0) for table in tables])
    return float(brier_lm(sums[:, :-1] / sums[:, -1:]).mean())


RECIPE = Experiment(
    name="recipe",
    question="Which options make a CALM better for the same training FLOPs?",
    cells=_cells,
    columns=("training_tokens", "training_flops", "inference_flops", *BRIER_COLUMNS,
             "held-out/energy", "held-out/bits_per_token"),
    panels=lambda scale: [
        Panel("Recipes", "recipe", "held-out/brier1", note="all with the same training FLOPs")
    ],
    claims=_claims,
    analysis=_halves,
    notes="All arms share one autoencoder and have the training FLOPs of the first, their terms "
    "counted: an arm that costs more takes fewer steps. Energy scores of arms with another "
    "exponent in training are those of exponent 1. The baseline is scored at every token, the "
    "others at the starts of chunks. Draws of a readout are not likelihood-free. Scale `demo` is "
    "the text and the budget of `calm demo`; `desk` has another text.",
)  # fmt: skip
