"""How the head's last layer starts, and what the plateau of the first steps is."""

from collections.abc import Sequence

from calm.experiments.experiment import BRIER_COLUMNS, Cell, Experiment, Panel, Result
from calm.experiments.scales import Scale

__all__ = ["START"]

NEAR = 0.02  # a loss this close to the unconditional one, as a share of it, is on the plateau


def _cells(scale: Scale, seed: int) -> list[Cell]:
    cells = []
    for optimizer, rates in scale.grid.optimizers.items():
        for start in ("zero", "scaled"):
            training = scale.calm(
                seed, logging_steps=scale.grid.curve_steps,
                config_overrides={"head_init": start}, **rates,
            )  # fmt: skip
            labels = {"start": start, "optimizer": optimizer}
            cells.append(Cell(labels, training, seed=seed))
    return cells


def _plateaus(results: Sequence[Result]) -> str:
    """How long each run stays at the energy score of a model that knows no context."""
    lines = ["| start | optimizer | seed | unconditional score | steps until below it |",
             "|---|---|---|---|---|"]  # fmt: skip
    for result in results:
        level = result.values["held-out/unconditional"]
        below = [entry["step"] for entry in result.curve if entry["loss"] < (1 - NEAR) * level]
        left = f"{below[0]:.0f}" if below else f"more than {result.curve[-1]['step']:.0f}"
        labels = " | ".join(map(str, (*result.labels.values(), result.seed)))
        lines.append(f"| {labels} | {level:.3f} | {left} |")
    lines.append(
        "\nThe unconditional score is what the energy loss is for a head that draws latents of "
        "other positions whatever the context. A loss on it says that the head has learned which "
        "latents there are, and nothing yet about which follows which."
    )
    return "\n".join(lines)


START = Experiment(
    name="start",
    question="How should the head's last layer start, and what is the plateau of the first steps?",
    cells=_cells,
    columns=BRIER_COLUMNS,
    panels=lambda scale: [
        Panel(f"Loss, {optimizer}", "step", "loss", line="start", where=[{"optimizer": optimizer}],
              note="training loss over steps", is_curve=True)
        for optimizer in scale.grid.optimizers
    ],
    analysis=_plateaus,
    notes="Not in the paper, whose head starts at zero and stays near BrierLM 0 for about 2000 "
    "steps (figures 5 and 8).",
)  # fmt: skip
