"""Health of a run: diagnostics in its logs, and a line of advice when one turns bad.

A log of training has what costs nothing: ``spread_ratio`` from the two terms of the energy loss,
``collapsed`` from the KL divergence of each latent dimension. An evaluation of a CALM measures the
rest on its first `POSITIONS` chunks (`calm.evaluation.measures`), however many it scores, so that
the cost stays small beside training. When to worry and what to do is in
`calm.evaluation.diagnostics`.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from calm.evaluation.diagnostics import advice
from calm.evaluation.measures import CALM_MEASURES, measure_sequences, ratios_of
from calm.labels import Term

__all__ = ["HealthAdvice", "health_metrics", "health_term"]

logger = logging.getLogger(__name__)

POSITIONS = 1024  # predicted chunks of an evaluation that are measured
START = 0.1  # share of a training before which numbers mean little
KEPT = ("reconstruction", "draw_agreement", "vote_margin")  # measures that are logged as they are
EVALUATED = "eval_"


def health_term(
    model: Any,
    inputs: Mapping[str, Tensor],
    *,
    num_samples: int,
    seed: Tensor,
    first_sequence: int,
    first_of_all: int,
) -> Term:
    """`CALM_MEASURES` of the sequences whose health is measured; of the others 0, counted 0 times.

    Args:
        model: a CALM.
        inputs: ``input_ids`` and ``labels`` ``[B, T]``.
        num_samples: draws of each chunk.
        seed: of the draws.
        first_sequence: index of the first sequence in the evaluation set.
        first_of_all: the least such index of all processes, which work together where weights are
            sharded.
    """
    ids, labels = inputs["input_ids"], inputs["labels"]
    limit = -(-POSITIONS // max(1, ids.shape[1] // model.patch_size - 1))
    sums = torch.zeros(len(ids), len(CALM_MEASURES), dtype=torch.float64, device=ids.device)
    counts = torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
    if first_of_all < limit:
        rows = slice(0, max(1, limit - first_sequence))
        found, counted = measure_sequences(
            model, ids[rows], labels[rows], num_samples=num_samples, seed=seed,
            first_sequence=first_sequence,
        )  # fmt: skip
        index = first_sequence + torch.arange(len(found), device=ids.device)
        counts[rows] = torch.where(index < limit, counted, 0).double()
        sums[rows] = torch.where((index < limit)[:, None], found, 0)
    return Term(sums, counts)


def health_metrics(means: Tensor) -> dict[str, float]:
    """What an evaluation logs of the means of `health_term`, ``[C]``."""
    named = dict(zip(CALM_MEASURES, means.tolist(), strict=True))
    return {name: named[name] for name in KEPT} | ratios_of(named)


class HealthAdvice(TrainerCallback):
    """Warns when a diagnostic in the logs of a run turns bad; once, until an evaluation is good.

    The first tenth of a training is left out.

    Args:
        progress: the share of the training that is done.
    """

    def __init__(self, progress: Callable[[], float]) -> None:
        self._progress = progress
        self._told: set[str] = set()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Compare what is logged with the thresholds."""
        if not state.is_world_process_zero or self._progress() < START:
            return
        is_evaluation = any(name.startswith(EVALUATED) for name in logs or {})
        values = {name.removeprefix(EVALUATED): value for name, value in (logs or {}).items()}
        if is_evaluation and "accuracy" in values:  # of an autoencoder
            values["reconstruction"] = values["accuracy"]
        for name, value in values.items():
            lines = advice({name: value})
            if lines and name not in self._told:
                self._told.add(name)
                logger.warning("step %d: %s", state.global_step, lines[0])
            elif is_evaluation and not lines:
                self._told.discard(name)
