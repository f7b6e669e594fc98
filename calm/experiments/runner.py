"""Runs an experiment: trains and measures cell by cell, and goes on where it was interrupted.

``<root>/models/<key>`` holds the models, which experiments share; ``<root>/<experiment>`` holds
``results.json``, written anew after every cell, then ``report.md`` and ``report.png``.
"""

import json
import platform
import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from calm.environment import installed_version
from calm.errors import UserError
from calm.experiments.experiment import Cell, Experiment, Result
from calm.experiments.measures import MEASURES, Texts, cost_of
from calm.experiments.scales import Scale
from calm.experiments.trained import Training, ensure_trained
from calm.integrity import write_atomically
from calm.training.checkpoints.lock import locked
from calm.training.flags.recipe import Stage
from calm.training.stages import STAGES

__all__ = ["RESULTS", "Record", "all_cells", "run_experiment", "training_commands"]

RESULTS = "results.json"
MODELS = "models"
Progress = Callable[[Sequence[Cell]], Iterable[Cell]]


@dataclass
class Record:
    """What ``results.json`` holds.

    Attributes:
        experiment: its name.
        configuration: of the whole folder; another one is refused.
        machine: where the newest cell ran.
        results: of the cells that are finished.
    """

    experiment: str
    configuration: dict[str, Any]
    machine: dict[str, str]
    results: list[Result]

    def write(self, path: Path) -> None:
        """Replace the file in one step."""
        text = json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":"))
        write_atomically(path, text.replace('{"key"', '\n{"key"') + "\n")

    def current(self, experiment: Experiment, scale: Scale) -> list[Result]:
        """Results of the cells that the grid has, for all seeds that have results, in its order.

        A result of a recipe or a grid that has changed since is not among them.
        """
        seeds = sorted({result.seed for result in self.results})
        known = {result.key: result for result in self.results}
        cells = all_cells(experiment, replace(scale, seeds=tuple(seeds)))
        return [known[cell.key] for cell in cells if cell.key in known]

    @classmethod
    def read(cls, path: Path) -> "Record":
        """What an earlier run has written.

        Raises:
            UserError: it is damaged.
        """
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            fields["results"] = [Result(**entry) for entry in fields["results"]]
            if not all(isinstance(result.seed, int) for result in fields["results"]):
                raise TypeError("a seed is no whole number")
            return cls(**fields)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}): delete it to start again") from error


def all_cells(experiment: Experiment, scale: Scale) -> list[Cell]:
    """The cells of all seeds.

    Raises:
        UserError: two cells have the same labels and seed.
    """
    cells = [cell for seed in scale.seeds for cell in experiment.cells(scale, seed)]
    places = [(cell.name, cell.seed) for cell in cells]
    if len(set(places)) < len(places):
        raise UserError(f"{experiment.name}: two cells of its grid have the same labels")
    return cells


def training_commands(cells: Sequence[Cell], root: Path) -> list[str]:
    """The commands that train the models of `cells`, each once.

    Teachers of autoencoders come first, then autoencoders, then all others.
    """
    wanted: dict[str, Training] = {}
    for cell in cells:
        for training in (*cell.training.needed, cell.training):
            wanted.setdefault(training.key, training)
    needed = {each.key for training in wanted.values() for each in training.needed}

    def place(training: Training) -> int:
        is_autoencoder = training.stage is Stage.AUTOENCODER
        return 1 if is_autoencoder else 0 if training.key in needed else 2

    ordered = sorted(wanted.values(), key=place)
    return [
        shlex.join(["calm", STAGES[training.stage].command, *training.words(root / MODELS)])
        for training in ordered
    ]


def run_experiment(
    experiment: Experiment,
    scale: Scale,
    texts: Texts,
    root: Path,
    *,
    progress: Progress = list,
) -> Record:
    """Train and measure every cell that ``results.json`` lacks; the record of all.

    Args:
        experiment: what to run.
        scale: how large.
        texts: what models are scored on.
        root: folder of the scale's models and experiments.
        progress: wraps the cells, to show a bar.

    Raises:
        UserError: results of another configuration are there; training fails.
    """
    folder = root / experiment.name
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        record = _open(folder / RESULTS, experiment, scale, texts)
        known = {result.key for result in record.results}
        for cell in progress(all_cells(experiment, scale)):
            if cell.key in known:
                continue
            result = _run(cell, scale, texts, root / MODELS)
            record.results.append(result)
            record.machine = _machine()
            record.write(folder / RESULTS)
    return record


def _run(cell: Cell, scale: Scale, texts: Texts, models: Path) -> Result:
    began = time.perf_counter()
    trained = ensure_trained(cell.training, models)
    measured = MEASURES[cell.measure](trained, texts, scale, **cell.options)
    values = {
        **cost_of(trained, cell.options.get("checkpoint")),
        **measured.values,
        "seconds": time.perf_counter() - began,
    }
    return Result(
        key=cell.key, labels=dict(cell.labels), seed=cell.seed, values=values,
        groups=measured.groups, curve=measured.curve,
    )  # fmt: skip


def _open(path: Path, experiment: Experiment, scale: Scale, texts: Texts) -> Record:
    """The record at `path`, or a new one; an error if it is of another configuration."""
    configuration = {
        "scale": scale.name,
        "text": {name: str(scale.common.get(name, "")) for name in ("dataset_name", "train_file")},
        "texts": texts.describe(),
        "stamps": texts.stamps(),
        "blocks": scale.blocks,
        "draws": scale.draws,
    }
    if not path.is_file():
        return Record(experiment.name, configuration, _machine(), [])
    record = Record.read(path)
    for name, value in configuration.items():
        there = record.configuration.setdefault(name, value)  # older records lack some
        if there != value:
            raise UserError(
                f"{path} holds results of another configuration: {name} was {there}, now {value}; "
                "pass another --output-dir, or delete the file"
            )
    return record


def _machine() -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "device": device, "threads": str(torch.get_num_threads()),
        "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__,
        "calm-lm": installed_version("calm-lm") or "not installed",
    }  # fmt: skip
