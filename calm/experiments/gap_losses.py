"""Losses of BrierLM, from the scores of a `Probe`.

With the token baseline on the same n-grams, BrierLM falls in two steps:

    baseline - slot-causal readout = loss of the trunk, and of reading chunks
    slot-causal readout - draws    = loss of the head and its latent
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calm.errors import UserError
from calm.evaluation.bootstrap import ORDERS, brier_lm, corpus_means
from calm.evaluation.paired import (
    METRICS,
    PairedDifference,
    common_positions,
    paired_difference,
    paired_means,
    paired_steps,
)
from calm.evaluation.scores import TextScores
from calm.experiments.gap_measures import Probe

__all__ = ["Dispersion", "Gap", "Losses", "difference", "losses_of", "mean_of"]


@dataclass(frozen=True)
class Dispersion:
    """BrierLM over ``noise_spread``, chosen on one half of the text and confirmed on the other.

    Attributes:
        values: spread -> Brier-1 to Brier-4 and BrierLM on the half that chooses.
        chosen: the spread whose BrierLM is highest there; of Brier-1, where BrierLM is 0 for all.
        gain: scores with it minus scores with spread 1, on the half that confirms.
    """

    values: dict[float, dict[str, float]]
    chosen: float
    gain: PairedDifference


@dataclass(frozen=True)
class Losses:
    """The three numbers of the probe, as differences at the same positions.

    Attributes:
        trunk: baseline minus slot-causal readout; None without a baseline.
        head: slot-causal readout minus the model's draws at spread 1.
        trunk_minus_head: of the two losses, which is larger; None without a baseline.
        dispersion: the part of the head's loss that another spread wins back.
    """

    trunk: PairedDifference | None
    head: PairedDifference
    trunk_minus_head: PairedDifference | None
    dispersion: Dispersion


@dataclass(frozen=True)
class Gap:
    """What the probe found; every number with its 95 % interval over spans of the text.

    Attributes:
        measured_on: model, text and settings.
        patch_size: K.
        scores: Brier-1 to Brier-4 and BrierLM of ``baseline`` (if there is one), ``causal``,
            ``independent``, the model's ``own`` readout (if it has one) and ``draws``, at the
            positions that all have.
        losses: trunk, head and dispersion.
        joint: slot-causal readout minus independent readout, likewise: what tokens of a chunk say
            of each other.
        bits: bits of a chunk under readouts and baseline, where all have them.
        tokens_per_byte: turns bits a token into bits a byte.
        slots: of readouts and draws ``match`` and ``collision`` of slot 1 to K.
        latent: see `Probe.latent`.
    """

    measured_on: dict[str, Any]
    patch_size: int
    scores: dict[str, PairedDifference]
    losses: Losses
    joint: PairedDifference
    bits: dict[str, PairedDifference]
    tokens_per_byte: float
    slots: dict[str, PairedDifference]
    latent: dict[str, float]


def losses_of(probe: Probe, baseline: TextScores | None = None) -> Losses:
    """Trunk, head and dispersion: one readout, and draws at every spread.

    Args:
        probe: of the model.
        baseline: scores of the token baseline on the same text, for the loss of the trunk.
    """
    seed = probe.options.seed
    given = [] if baseline is None else [baseline]
    readout, draws, *others = common_positions([probe.readout("causal"), probe.draws(), *given])
    return Losses(
        trunk=difference(others[0], readout, seed) if others else None,
        head=difference(readout, draws, seed),
        trunk_minus_head=_steps(others[0], readout, draws, seed) if others else None,
        dispersion=_dispersion(probe),
    )


def difference(one: TextScores, other: TextScores, seed: int) -> PairedDifference:
    """Scores of `one` minus those of `other` where both have some, resampled in spans of text."""
    (sums, counts), (others, _) = _grouped([one, other])
    return _compared(sums, counts, others, one.names, seed)


def mean_of(scores: TextScores, seed: int) -> PairedDifference:
    """The scores themselves, with their intervals: their difference from nothing."""
    sums, counts = scores.grouped(scores.protocol["block_size"])
    return _compared(sums, counts, torch.zeros_like(sums), scores.names, seed)


def _steps(one: TextScores, other: TextScores, third: TextScores, seed: int) -> PairedDifference:
    (sums, counts), (others, _), (thirds, _) = _grouped([one, other, third])
    return paired_steps(sums, counts, others, thirds, seed=seed)


def _compared(
    sums: Tensor, counts: Tensor, others: Tensor, names: tuple[str, ...], seed: int
) -> PairedDifference:
    if names == ORDERS:
        return paired_difference(sums, counts, others, seed=seed)
    return paired_means(sums, counts, others, names, seed=seed)


def _grouped(scores: list[TextScores]) -> list[tuple[Tensor, Tensor]]:
    """Sums and counts of the positions that all share, in spans of a block of text."""
    return [one.grouped(one.protocol["block_size"]) for one in common_positions(scores)]


def _dispersion(probe: Probe) -> Dispersion:
    """Spans of text choose and confirm in turn."""
    spreads = sorted({1.0, *probe.options.spreads})
    grouped = _grouped([probe.draws(spread) for spread in spreads])
    counts = grouped[0][1]
    if len(counts) < 2:
        raise UserError(
            "the text is too short to choose a spread on one half of it and confirm it on the "
            "other; pass more blocks"
        )
    values = {}
    for spread, (sums, _) in zip(spreads, grouped, strict=True):
        means = corpus_means(sums[::2], counts[::2])
        named = [*means.tolist(), float(brier_lm(means))]
        values[spread] = dict(zip(METRICS, named, strict=True))
    chosen = max(spreads, key=lambda spread: (values[spread]["brier_lm"], values[spread]["brier1"]))
    confirming = {spread: sums[1::2] for spread, (sums, _) in zip(spreads, grouped, strict=True)}
    gain = paired_difference(
        confirming[chosen], counts[1::2], confirming[1.0], seed=probe.options.seed
    )
    return Dispersion(values, chosen, gain)
