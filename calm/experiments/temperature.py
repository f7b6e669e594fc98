"""`calm experiment temperature`: what each way to lower the temperature gives, and what it costs.

Every method draws chunks at the same held-out positions of a trained model. `temperature.md`,
`temperature.json` and `temperature.png` then show accuracy against diversity and against cost, and
how far the distribution of each method is from the exact one.
"""

import json
import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from calm.decoding.sampling.methods import NoiseScale
from calm.experiments.temperature_measures import (
    Outcomes,
    Positions,
    Result,
    Setting,
    Study,
    StudyOptions,
    difference,
    draw_outcomes,
    geometric_mean,
    interval,
    milliseconds,
    squared_distance,
)
from calm.experiments.temperature_plot import plot_study
from calm.models.continuous import ContinuousTransformer
from calm.models.heads.tempered import in_range

__all__ = ["QUICK", "run_study", "settings_of", "to_markdown", "write_study"]

ONE_DRAW = ("noise_scale", "amortized", "readout")  # methods that stand against the vote
ANY_TEMPERATURE = 0.5  # for methods whose distribution does not depend on it
Progress = Callable[[list[Setting]], Iterable[Setting]]


QUICK = StudyOptions(
    temperatures=(0.5,), candidates=(10,), medoids=(8,), noise_temperatures=(), repeats=2,
    max_draws=50,
)  # fmt: skip


def settings_of(options: StudyOptions, model: ContinuousTransformer) -> list[Setting]:
    """Every setting that the study measures of this model, in the order of the table.

    Last are those of models that have more than their head: a head for low temperatures, where it
    knows them, and a readout.
    """
    temperatures, bounds = options.temperatures, model.config.tempered_range
    draws_at_once = max(options.candidates)
    noise_temperatures = sorted({*temperatures, *options.noise_temperatures}, reverse=True)
    return [
        Setting("direct"),
        *(Setting("exact", t, draws_at_once) for t in temperatures),
        *(Setting("batch", t, n) for n in options.candidates for t in temperatures),
        *(Setting("medoid", ANY_TEMPERATURE, n) for n in options.medoids),
        *(Setting("noise_scale", t) for t in noise_temperatures),
        Setting("direct", noise_scale=0.0),
        *(Setting("amortized", t) for t in temperatures if bounds and in_range(t, bounds)),
        *(Setting("readout", t) for t in (1.0, *temperatures) if model.token_readout is not None),
    ]


def run_study(
    model: ContinuousTransformer,
    positions: Positions,
    options: StudyOptions,
    progress: Progress = list,
) -> Study:
    """Measure every setting.

    Args:
        model: a CALM, in evaluation mode.
        positions: see `take_positions`.
        options: how much is measured.
        progress: wraps the settings, to show a bar.
    """
    measured: list[tuple[Setting, Outcomes, float]] = []
    for index, setting in enumerate(progress(settings_of(options, model))):
        predictor = setting.build(model, options.max_draws)
        # Settings draw from seeds of their own: distances need independent draws.
        seed = options.seed * 1009 + index
        outcomes = draw_outcomes(predictor, positions, options.repeats, seed)
        measured.append((setting, outcomes, milliseconds(predictor, positions)))
    exact = {
        setting.temperature: outcomes
        for setting, outcomes, _ in measured
        if setting.method == "exact"
    }
    is_capped = torch.stack([outcomes.is_fallback for outcomes in exact.values()])
    within_cap = ~is_capped.any(0).any(0)
    measured_on = {
        "positions": len(positions), "positions_within_cap": int(within_cap.sum()),
        "patch_size": model.patch_size, "repeats": options.repeats, "max_draws": options.max_draws,
        "seed": options.seed, "machine": platform.machine(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "device": str(model.device),
    }  # fmt: skip
    votes = {  # of each temperature, that among most candidates, which is the last
        setting.temperature: outcomes
        for setting, outcomes, _ in measured
        if setting.method == "batch"
    }
    results = [_result(*entry, positions, exact, votes, within_cap) for entry in measured]
    return Study(measured_on, results)


def _result(
    setting: Setting,
    outcomes: Outcomes,
    elapsed: float,
    positions: Positions,
    exact: dict[float, Outcomes],
    votes: dict[float, Outcomes],
    within_cap: Tensor,
) -> Result:
    matches, collisions = outcomes.matches(positions.chunks), outcomes.collisions()
    vote = votes.get(setting.temperature) if setting.method in ONE_DRAW else None
    return Result(
        setting=setting,
        accuracy=float(geometric_mean(matches.mean(0))),
        accuracy_interval=interval(matches),
        collision=float(geometric_mean(collisions.mean(0))),
        collision_interval=interval(collisions),
        distances=[
            (temperature, *squared_distance(outcomes, other, within_cap))
            for temperature, other in exact.items()
            if setting.method != "exact"
        ],
        draws=float(outcomes.draws.double().mean()),
        fallbacks=float(outcomes.is_fallback.double().mean()),
        milliseconds=elapsed,
        against_vote=None
        if vote is None
        else difference((matches, collisions), (vote.matches(positions.chunks), vote.collisions())),
    )


def write_study(study: Study, folder: Path) -> str:
    """Write table, record and figure to `folder`; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    table = to_markdown(study)
    record = json.dumps(asdict(study), indent=1)
    (folder / "temperature.json").write_text(record + "\n", encoding="utf-8")
    (folder / "temperature.md").write_text(table, encoding="utf-8")
    plot_study(study, folder / "temperature.png")
    return table


def to_markdown(study: Study) -> str:
    """Three tables: of settings, of distances to exact distributions, of differences from votes."""
    facts = ", ".join(f"{name} {value}" for name, value in study.measured_on.items())
    tables = (_settings_table(study), _nearest_table(study), _differences_table(study))
    return "\n\n".join([*tables, f"Measured on: {facts}.\n"])


def _settings_table(study: Study) -> str:
    lines = [
        "| method | T | N | noise | accuracy, % | collision, % | draws a chunk | ms a chunk "
        "| fallback, % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in study.results:
        setting = result.setting
        cells = [
            setting.method,
            "" if setting.method in ("direct", "medoid") else f"{setting.temperature:.2f}",
            f"{setting.num_samples}" if setting.method in ("batch", "medoid") else "",
            f"{_noise(setting):.3g}",
            _percent(result.accuracy, result.accuracy_interval),
            _percent(result.collision, result.collision_interval),
            f"{result.draws:.0f}",
            f"{result.milliseconds:.2f}",
            f"{100 * result.fallbacks:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _noise(setting: Setting) -> float:
    """Factor on the noise, or on what it contributes."""
    if setting.method == "noise_scale":
        return NoiseScale(temperature=setting.temperature).noise_spread
    return setting.noise_scale


def _nearest_table(study: Study) -> str:
    """Squared distances from exact distributions: the model's, and the least of each method."""
    by_method: dict[str, list[Result]] = {}
    for result in study.results:
        name = "plain" if result.setting == Setting("direct") else result.setting.method
        by_method.setdefault(name, []).append(result)
    columns = {  # name: results, and whether those of the same temperature alone count
        "the model itself": (by_method["plain"], False),
        "vote, same T": (by_method["batch"], True),
        "medoid": (by_method["medoid"], False),
        "noise scaled, same T": (by_method["noise_scale"], True),
        "noise scaled": (by_method["noise_scale"], False),
        **{
            f"{name}, same T": (by_method[name], True)
            for name in ("amortized", "readout")
            if name in by_method
        },
    }
    lines = [
        f"| exact distribution at T | {' | '.join(columns)} |",
        "|---|" + len(columns) * "---|",
    ]
    for index, (temperature, *_) in enumerate(by_method["plain"][0].distances):
        cells = [
            _nearest([r for r in results if not is_same or r.setting.temperature == temperature],
                     index)
            for results, is_same in columns.values()
        ]  # fmt: skip
        lines.append(f"| {temperature:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _nearest(results: list[Result], index: int) -> str:
    """Least distance from the exact distribution number `index`, and the setting that has it."""
    if not results:
        return ""
    best = min(results, key=lambda result: result.distances[index][1])
    setting = best.setting
    _, distance, error = best.distances[index]
    text = f"{distance:.3f} ± {error:.3f}"
    if setting.method in ("direct", "noise_scale"):
        return f"{text} (noise times {_noise(setting):.3g})"
    return f"{text} (N = {setting.num_samples})" if setting.num_samples > 1 else text


def _differences_table(study: Study) -> str:
    """How far methods of one draw are from the vote among most candidates, in points."""
    lines = [
        "| one draw | T | accuracy - that of the vote | collision - that of the vote |",
        "|---|---|---|---|",
    ]
    for result in study.results:
        if (found := result.against_vote) is None:
            continue
        cells = [
            result.setting.method,
            f"{result.setting.temperature:.2f}",
            _percent(found.accuracy, found.accuracy_interval),
            _percent(found.collision, found.collision_interval),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(value: float, ends: tuple[float, float]) -> str:
    low, high = (100 * end for end in ends)
    return f"{100 * value:.1f} [{low:.1f}, {high:.1f}]"
