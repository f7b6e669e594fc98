"""Energy, diffusion and flow heads at equal training FLOPs (paper, figures 8 and 9)."""

from typing import Any

from calm.experiments.experiment import BRIER_COLUMNS, Cell, Claim, Experiment, Panel
from calm.experiments.scales import Scale

__all__ = ["HEADS"]

KINDS = ("energy", "diffusion", "flow")
EVALUATIONS = {"energy": 1, "diffusion": 100, "flow": 20}  # of the network, as published
PUBLISHED = "published"
EACH_STEP = {"diffusion": 1, "flow": 2}
EULER = "flow, Euler"  # the flow head sampled by Euler's rule, with as many evaluations


def _cells(scale: Scale, seed: int) -> list[Cell]:
    reference = scale.flops(scale.calm())
    cells = []
    for kind in KINDS:
        for share in scale.grid.budget_shares:
            training = scale.at_budget(scale.calm(seed, model_type=kind), share * reference)
            labels = {"head": kind, "budget": share, "sampling": PUBLISHED,
                      "evaluations": EVALUATIONS[kind]}  # fmt: skip
            cells.append(Cell(labels, training, seed=seed))
        for steps in scale.grid.sampling_steps.get(kind, ()):
            evaluations = steps * EACH_STEP[kind]
            samplers: dict[str, dict[str, Any]] = {kind: {"sampling_steps": steps}}
            if kind == "flow":
                samplers[EULER] = {"sampling_steps": evaluations, "flow_sampler": "euler"}
            for name, sampling in samplers.items():
                labels = {
                    "head": name, "budget": share,
                    "sampling": f"{sampling['sampling_steps']} steps", "evaluations": evaluations,
                }  # fmt: skip
                cells.append(Cell(labels, training, options={"sampling": sampling}, seed=seed))
    return cells


def _claims(scale: Scale) -> list[Claim]:
    def at(kind: str, evaluations: int | None = None) -> dict[str, Any]:
        return {"head": kind, "budget": scale.grid.budget_shares[-1],
                "evaluations": evaluations or EVALUATIONS[kind]}  # fmt: skip

    claims = [
        Claim(
            "figure 8", f"the energy head is better than the {other} head", at("energy"), at(other)
        )
        for other in ("diffusion", "flow")
    ]
    claims.append(
        Claim(
            "figure 8",
            "the flow head is better than the diffusion head",
            at("flow"),
            at("diffusion"),
        )
    )
    for kind in ("diffusion", "flow"):
        fewest = scale.grid.sampling_steps[kind][0] * EACH_STEP[kind]
        claims.append(
            Claim("figure 9", f"the {kind} head needs more than {fewest} evaluations", at(kind),
                  at(kind, fewest))
        )  # fmt: skip
    claims += [
        Claim("figure 9", f"the midpoint rule is better than Euler's at {count} evaluations",
              at("flow", count), at(EULER, count))
        for count in (EACH_STEP["flow"] * steps for steps in scale.grid.sampling_steps["flow"])
    ]  # fmt: skip
    return claims


HEADS = Experiment(
    name="heads",
    question="Which head is best for the same training FLOPs, and what does a draw cost?",
    cells=_cells,
    columns=("training_flops", "inference_flops", *BRIER_COLUMNS),
    panels=lambda scale: [
        Panel("Training", "budget", "held-out/brier1", line="head", where=[{"sampling": PUBLISHED}],
              note="budgets are shares of the reference's training FLOPs"),
        Panel("Sampling", "evaluations", "held-out/brier1", line="head", log_x=True,
              where=[{"budget": scale.grid.budget_shares[-1]}],
              note="evaluations of the network for a draw"),
    ],
    claims=_claims,
    notes="Unlike figure 8, heads get equal training FLOPs instead of equal steps, and all of them "
    "the learning rate that was chosen for the energy head. Each share of the budget is a run of "
    "its own with its whole schedule. A midpoint step of flow takes two evaluations, "
    "an Euler step one.",
)  # fmt: skip
