"""What is wrong with a model: a few numbers, each with the value where to worry and what to do.

All are unbiased estimates from draws, or exact. x and x' are draws of the head, y and y' of the
autoencoder's posterior of the true chunk, |.|^α the distance of the energy score. Collapsed latent
dimensions are counted by `Autoencoder.collapsed`, as training logs them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from calm_kernels.energy_score import expected_distance

__all__ = [
    "ADVICE",
    "Advice",
    "advice",
    "conditioning_gap",
    "draw_agreement",
    "energy_floor",
    "spread_ratio",
    "vote_margin",
]


def draw_agreement(draws: Tensor) -> Tensor:
    """Share of pairs of draws that are the same chunk: sum_x c_x (c_x - 1) / (N (N - 1)).

    Unbiased for sum_x P(x)^2, the chance that two draws agree. At T = 1/2 the exact method needs
    2 / sum_x P(x)^2 draws a chunk on average (paper, theorem 2).

    Args:
        draws: token ids ``[N, ..., K]``, N >= 2.

    Returns: float64 ``[...]``.
    """
    count = len(draws)
    if count < 2:
        raise ValueError(f"draws must hold at least 2 draws to compare, got {count}")
    pairs = [(draws[lag:] == draws[:-lag]).all(-1).sum(0) for lag in range(1, count)]
    return torch.stack(pairs).sum(0).double() / (count * (count - 1) / 2)


def vote_margin(draws: Tensor) -> Tensor:
    """(c_1 - c_2) / N: how far the chunk drawn most often is ahead of the next.

    The vote at low temperature (paper, algorithm 2) chooses among chunks that agree; with a margin
    near 0 chance decides.

    Args:
        draws: token ids ``[N, ..., K]``.

    Returns: float64 ``[...]``.
    Cost: N^2 comparisons, one row of them held at a time.
    """
    counts = torch.stack([(draws == draw).all(-1).sum(0) for draw in draws])  # [N, ...]
    winner = counts.argmax(0)
    index = winner[None, ..., None].expand(1, *draws.shape[1:])
    is_other = (draws != draws.gather(0, index)).any(-1)
    runner_up = torch.where(is_other, counts, 0).amax(0)
    return (counts.amax(0) - runner_up).double() / len(draws)


def energy_floor(log_std: Tensor, exponent: float = 1.0) -> Tensor:
    """E|y - y'|^α, exact: the least that the energy loss can be at a position.

    The loss 2 E|x - y|^α - E|x - x'|^α is least where x has the distribution of y, and is
    E|y - y'|^α there, with y - y' ~ N(0, 2 std^2). A head reaches it only if the text leaves no
    doubt which chunk follows, so that the excess of a perfect model is what the text leaves open.

    Args:
        log_std: of the posterior, ``[..., L]``.
        exponent: α.

    Returns: ``[...]``.
    """
    spread = math.sqrt(2) * log_std.exp()
    return expected_distance(torch.zeros_like(spread), spread, exponent)


def conditioning_gap(own_loss: Tensor, other_loss: Tensor) -> Tensor:
    """Energy loss of draws for another position minus that of draws for the right one.

    gap = 2 E|o - y|^α - E|o - o'|^α - (2 E|x - y|^α - E|x - x'|^α)

    x are draws with the position's own hidden state, o with that of another position and the same
    noise. 0 for a head that ignores the hidden state.

    Args:
        own_loss: of the draws x, ``[...]``.
        other_loss: of the draws o, ``[...]``.
    """
    return other_loss - own_loss


def spread_ratio(fidelity: Tensor, diversity: Tensor) -> Tensor:
    """E|x - x'|^α / E|x - y|^α: how wide the draws are beside their distance from the truth.

    1 for a head with the right distribution, 0 for one that always draws the same, towards 2 for
    one whose draws are far wider than the truth. Divide means over positions, not positions.

    Args:
        fidelity: mean of 2 E|x - y|^α, as the energy loss has it.
        diversity: mean of E|x - x'|^α.
    """
    return 2 * diversity / fidelity


@dataclass(frozen=True)
class Advice:
    """When to worry about a diagnostic, and what to do then.

    Attributes:
        low: worry below this value; None for never.
        high: worry above this value; None for never.
        text: what it means, and what to do.
    """

    low: float | None
    high: float | None
    text: str

    def applies(self, value: float) -> bool:
        """Whether `value` is beyond a threshold."""
        is_low = self.low is not None and value < self.low
        return is_low or (self.high is not None and value > self.high)


ADVICE = {
    "collapsed": Advice(
        None, 0.5,
        "posterior collapse: most latent dimensions tell nothing of their chunk; lower kl_weight, "
        "raise kl_clamp, or take a smaller latent_size",
    ),
    "reconstruction": Advice(
        0.99, None,
        "the autoencoder loses tokens, and a language model on it cannot be better: train it "
        "longer, or lower its dropout and kl_weight",
    ),
    "conditioning_share": Advice(
        0.01, None,
        "with the hidden state of another position the loss is hardly higher, so the head ignores "
        "the text, as in the first steps of every run: train longer, or raise the learning rate",
    ),
    "spread_ratio": Advice(
        0.7, 1.3,
        "draws are far narrower (below 1) or wider (above 1) than the truth: an exponent near 2 "
        "trains their mean alone and one near 0 is mostly noise, so take beta near 1; draw more "
        "(num_samples)",
    ),
    "floor_share": Advice(
        None, 0.9,
        "the posterior's own spread is nearly all of the energy loss: compare models by its "
        "excess over the floor, not by the loss",
    ),
    "draw_agreement": Advice(
        0.02, None,
        "draws seldom agree, so that T = 1/2 needs hundreds of draws a chunk and low temperatures "
        "stall: take a smaller K, a higher T, or the vote among a fixed number of draws",
    ),
    "vote_margin": Advice(
        0.1, None,
        "chance decides most votes at low temperature: draw more chunks (num_samples), or raise T",
    ),
}  # fmt: skip


def advice(values: Mapping[str, float]) -> list[str]:
    """A line for every diagnostic of `values` that is beyond its threshold."""
    return [
        f"{name} is {values[name]:.3g}: {entry.text}"
        for name, entry in ADVICE.items()
        if name in values and entry.applies(values[name])
    ]
