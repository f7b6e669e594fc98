"""The folder of `calm experiment gap`: scores, values and the configuration that they are of."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from calm.errors import UserError
from calm.evaluation.scores import TextScores
from calm.evaluation.stored_scores import load_scores, save_scores
from calm.experiments.gap_losses import Gap
from calm.integrity import write_atomically

__all__ = ["GapStore"]

RESULTS, SCORES = "results.json", "scores"


class GapStore:
    """What a folder holds of a probe. A folder of another configuration is refused.

    Args:
        folder: of the probe, made if it is not there.
        configuration: everything that decides scores; JSON can hold it.
        announce: is told the name of each part before it is computed.

    Raises:
        UserError: results of another configuration are there, or damaged ones.
    """

    def __init__(
        self,
        folder: Path,
        configuration: dict[str, Any],
        announce: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._folder, self._path, self._announce = folder, folder / RESULTS, announce
        self._record: dict[str, Any] = {"configuration": configuration, "parts": {}}
        (folder / SCORES).mkdir(parents=True, exist_ok=True)
        if not self._path.is_file():
            self._write()
            return
        try:
            there = json.loads(self._path.read_text(encoding="utf-8"))
            found, self._record["parts"] = dict(there["configuration"]), dict(there["parts"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self._path} is damaged ({error}): delete the folder to start again"
            ) from error
        now = json.loads(json.dumps(configuration))
        for name in {**now, **found}:  # a setting that is as by default has no entry
            if found.get(name) != now.get(name):
                raise UserError(
                    f"{self._path} holds results of another configuration: {name} was "
                    f"{found.get(name)}, now {now.get(name)}; pass another --output-dir, or delete "
                    "the folder"
                )

    def scores(self, name: str, compute: Callable[[], TextScores]) -> TextScores:
        """The scores `name`, computed and kept if they are not there."""
        path = self._folder / SCORES / f"{name}.safetensors"
        if not path.is_file():
            self._announce(name)
            save_scores(compute(), path)
        return load_scores(path)

    def values(self, name: str, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The values `name`, likewise."""
        if name not in self._record["parts"]:
            self._announce(name)
            self._record["parts"][name] = compute()
            self._write()
        found: dict[str, float] = self._record["parts"][name]
        return found

    def finish(self, gap: Gap) -> None:
        """Add the results."""
        self._record["gap"] = asdict(gap)
        self._write()

    def _write(self) -> None:
        write_atomically(self._path, json.dumps(self._record, indent=1) + "\n")
