"""Sizes, chunk sizes and budgets: which K is best for the same training FLOPs (paper, figure 4).

Every arm reads the same bytes, without start chunks, and is scored on the same n-grams: those that
start at multiples of the largest K, and of 8 tokens at least.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from calm.experiments.experiment import BRIER_COLUMNS, Cell, Experiment, Finding, Panel, Result
from calm.experiments.isoflop import TOKENS, Arms, Gap, arms_of_budgets, change, fit_scores
from calm.experiments.scales import Scale
from calm.experiments.verdicts import verdict_on

__all__ = ["SCALING"]

EVERY = 8  # tokens between n-grams, at least: places at which every arm scores one, in any block
FIGURE_4 = {"K = 1": -1, "K = 2": -1, "K = 4": 1}  # signs of the gap to the baseline
LARGER_GAINS = (
    ("this paper's K as an axis of scaling", "a larger K gains with compute", 1),
    ("arXiv 2605.01188", "a smaller K gains with compute", -1),
)


def _cells(scale: Scale, seed: int) -> list[Cell]:
    chunk_sizes = scale.grid.chunk_sizes
    cells = []
    for flops, names in scale.grid.budgets:
        for size in scale.grid.sizes:
            if size.name not in names:
                continue
            models = {TOKENS: scale.baseline(seed, config_overrides=size.baseline)}
            models |= {f"K = {k}": _calm(scale, seed, k, size.calm) for k in chunk_sizes}
            for arm, training in models.items():
                cells.append(
                    Cell(
                        {"arm": arm, "size": size.name, "budget": flops},
                        scale.at_budget(training, flops),
                        options={"multiples_of": max(EVERY, *chunk_sizes)},
                        seed=seed,
                    )
                )
    return cells


def _calm(scale: Scale, seed: int, chunk_size: int, overrides: Mapping[str, Any]) -> Any:
    """A CALM on an autoencoder of its own, whose latent grows with K as in the paper."""
    reference = scale.autoencoder().flags["config_overrides"]
    width = int(reference.get("latent_size", 128)) // int(reference.get("patch_size", 4))
    autoencoder = scale.autoencoder(
        config_overrides={"patch_size": chunk_size, "latent_size": chunk_size * width}
    )
    return scale.calm(seed, autoencoder, config_overrides={**overrides, "has_start_patch": False})


def _findings(results: Sequence[Result]) -> list[Finding]:
    """Figure 4 at the largest budget, and whether the largest K gains on the smallest."""
    budgets = arms_of_budgets(results)
    last, rows = budgets[-1], []
    for arm, sign in FIGURE_4.items():
        if {arm, TOKENS} <= set(last.names):
            order = "better" if sign > 0 else "worse"
            text = f"{arm} is {order} than the token baseline for the same training FLOPs"
            at = f"at {last.budget:.2g} FLOPs"
            rows.append(_finding("figure 4", text, sign, last.gap(arm, TOKENS), at))
    chunked = sorted(set(last.names) - {TOKENS}, key=_chunk_size)
    if len(budgets) > 1 and len(chunked) > 1 and set(chunked) <= set(budgets[0].names):
        small, large = chunked[0], chunked[-1]
        gain = change(budgets[0], last, large, small)
        between = f"from {budgets[0].budget:.2g} to {last.budget:.2g} FLOPs"
        rows += [_finding(source, f"{text} ({large} against {small})", sign, gain, between)
                 for source, text, sign in LARGER_GAINS]  # fmt: skip
    return rows


def _finding(source: str, text: str, sign: int, gap: Gap, where: str) -> Finding:
    return Finding(source, text, verdict_on([sign * gap.sign]), f"Brier-1, %: {gap} {where}")


def _chunk_size(arm: str) -> int:
    return int(arm.rpartition(" ")[2])


def _analysis(results: Sequence[Result]) -> str:
    budgets = arms_of_budgets(results)
    best = [
        f"{arms.budget:.2e} | {arms.names[0]} | {arms.sizes[0]} | {100 * arms.scores[0]:.2f} | "
        f"{arms.names[1]} | {arms.gap(*arms.names[:2])} | {arms.share:.2f}"
        for arms in budgets
    ]
    compared = sorted({name for arms in budgets for name in arms.names} - {TOKENS})
    to_tokens = [
        " | ".join([
            f"{arms.budget:.2e}",
            *(str(arms.gap(arm, TOKENS)) if arm in arms.names else "" for arm in compared),
        ])
        for arms in budgets if TOKENS in arms.names
    ]  # fmt: skip
    fits = []
    for row in fit_scores(results):
        a, b, c = row["weights"]
        fits.append(
            f"{row['arm']} | {row['cells']} | {a:.3f} | {b:.4f} | {c:.4f} | "
            f"{100 * row['residual']:.2f} | {100 * row['held_out']:.2f}"
        )
    parts = [
        "Best arm of each budget. Sizes and the order of arms are chosen on every other stretch of "
        "the text, arms are compared on the rest:",
        _lines("training FLOPs | best | size | Brier-1, % | next | difference, 95 % | "
               "how often best", best),
        _edges(results, budgets),
        "Brier-1 minus that of the token baseline with the same training FLOPs, points with 95 % "
        "interval:",
        _lines(" | ".join(["training FLOPs", *compared]), to_tokens),
        "Brier-1 = a + b log₁₀ parameters + c log₁₀ tokens, the largest budget held out:",
        _lines("arm | cells | a | b | c | residual, points | held-out residual", fits)
        if fits else "too few cells for a fit",
    ]  # fmt: skip
    return "\n\n".join(parts)


def _edges(results: Sequence[Result], budgets: Sequence[Arms]) -> str:
    """How often the best size of an arm is the smallest or the largest that its budget has."""
    labels = [result.labels for result in results]
    sizes = list(dict.fromkeys(each["size"] for each in labels))  # from the smallest on
    found = []
    for arms in budgets:
        there = {each["size"] for each in labels if each["budget"] == arms.budget}
        ordered = [size for size in sizes if size in there]
        if len(ordered) > 1:
            found += [(size == ordered[0], size == ordered[-1]) for size in arms.sizes]
    if not found:
        return "One size for each budget: how the best size grows is not measured."
    smallest, largest = map(sum, zip(*found, strict=True))
    return (
        f"The best size of an arm is the smallest of its budget in {smallest} of {len(found)} "
        f"cases, the largest in {largest}: the optimum may lie beyond it, and a line "
        "falls where the next budget leaves that size out."
    )


def _lines(titles: str, rows: Sequence[str]) -> str:
    rule = " | ".join(["---"] * (titles.count("|") + 1))
    return "\n".join(f"| {line} |" for line in (titles, rule, *rows))


SCALING = Experiment(
    name="scaling",
    question="Which chunk size K is best for the same training FLOPs, and does that change?",
    cells=_cells,
    columns=("parameters", "training_tokens", "training_flops", "inference_flops", *BRIER_COLUMNS),
    panels=lambda scale: [
        Panel("Training", "budget", "held-out/brier1", line="arm", log_x=True, is_frontier=True,
              note="training FLOPs; lines pass the best size"),
        Panel("Inference", "inference_flops", "held-out/brier1", line="arm", log_x=True,
              where=[{"budget": scale.grid.budgets[-1].flops}],
              note="largest budget, one draw a chunk"),
    ],
    findings=_findings,
    analysis=_analysis,
    notes="Figure 4 trains every K for equal steps; here arms have equal training FLOPs. FLOPs are "
    "those of the language model: each K has an autoencoder of its own, trained for the recipe's "
    "steps and shared by all seeds. Learning rates are the recipes', tuned at one K and size.",
)  # fmt: skip
