"""The public function: check the arguments, choose the backend, call it."""

import math
from typing import Literal

import torch
from torch import Tensor

from calm_kernels.agreeing_patch.eager import (
    agreeing_patch_eager,
    count_occurrences,
    vote_weights,
)
from calm_kernels.agreeing_patch.reference import agreeing_patch_reference
from calm_kernels.agreeing_patch.votes import TOLERANCE, draw_votes, split_power
from calm_kernels.backend import Backend, resolve
from calm_kernels.checks import check_device, check_dtype, check_tensor
from calm_kernels.noise import Seed, as_seed

__all__ = ["agreeing_patch", "vote_chances"]

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)
NUMBERS = (torch.float64, torch.float32, *INTEGERS)


def agreeing_patch(
    candidates: Tensor,
    num_agreeing: int | float | Tensor,
    *,
    seed: Seed = None,
    first_row: int | Tensor = 0,
    form: Literal["factory", "gamma"] = "factory",
    return_counts: bool = False,
    backend: Backend | str = Backend.AUTO,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """One of N candidate chunks, chosen as if 1/T independent draws of the model had agreed on it.

    With c the number of times a chunk occurs among the candidates and s = 1/T = n + a, n = ⌊s⌋, it
    is chosen with a chance in proportion to its weight

        a = 0      w = C(c, n), the ways to pick n draws that all are this chunk (Algorithm 2)
        factory    w = C(c, n) h, with h the chance that the Bernoulli factory of Algorithm 1
                   accepts within the other N - n candidates, taken in random order
        gamma      w = Γ(c + 1) / Γ(c + 1 - s) for c >= n, else 0

    If all weights are zero, n is replaced by n - 1 (a stays), and so on to 1; the factory form ends
    in w = c. As N grows, the distribution tends to P(chunk)^s / Σ P^s. The factory form is unbiased
    but for chunks it leaves undecided, which it rejects; the gamma form accepts those.
    ``num_agreeing=1`` gives every candidate the same chance: it is one draw of the model.

    Args:
        candidates: ``[B, N, K]``, N, K >= 1, any integer dtype.
        num_agreeing: s >= 1, finite: a number, or a tensor of one or of B numbers (on a GPU its
            values are not read back, and those below 1 count as 1). A number within 1e-6 (relative)
            of an integer is that integer.
        seed: of one uniform a row, see `noise.as_seed`; ``[B]`` gives each row its own stream.
        first_row: global index of the first row.
        form: ``factory`` or ``gamma``, the weights for a > 0.
        return_counts: also return c of each candidate's chunk.
        backend: see `calm_kernels.backend`; all make the same choices for the same seed.

    Returns: tokens ``[B, K]`` in the dtype of `candidates`; level ``[B]`` int64, the n at which a
        weight was found (⌊s⌋ if none had to be replaced, 0 where the factory form ended in c);
        counts ``[B, N]`` int64 if asked for.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device, shape or range.

    Source: CALM, Algorithms 1 and 2. Cost: in torch K sorts, O(B N K log N) time and O(B N K)
        memory; in Triton two launches, O(B N² K) comparisons over the whole device and O(B N)
        memory. Neither loops over the batch or synchronises.
    """
    power = _checked_power(candidates, num_agreeing, form)
    chosen = resolve(backend, "agreeing_patch", candidates)
    seed = _checked_seed(seed, candidates)
    is_factory = form == "factory"
    match chosen:
        case Backend.REFERENCE:
            tokens, level, counts = agreeing_patch_reference(
                candidates, *split_power(power), draw_votes(power, seed, first_row), is_factory
            )
        case Backend.TRITON:
            from calm_kernels.agreeing_patch.function import agreeing_patch_triton

            tokens, level, counts = agreeing_patch_triton(
                candidates, power, seed, first_row, is_factory
            )
        case _:
            tokens, level, counts = agreeing_patch_eager(
                candidates, *split_power(power), draw_votes(power, seed, first_row), is_factory
            )
    # The kernels mark repeated occurrences by a sign.
    return (tokens, level, counts.abs().to(torch.int64)) if return_counts else (tokens, level)


def vote_chances(
    candidates: Tensor,
    num_agreeing: int | float | Tensor,
    *,
    form: Literal["factory", "gamma"] = "factory",
) -> Tensor:
    """The distribution of `agreeing_patch` over its candidates, without the draw of a vote.

    chance of a candidate = w(chunk) / (c Σ w),    summed over the chunks that occur

    The c copies of a chunk share its chance equally. So a mixture of the draws with these chances
    has the distribution of the vote's winner, given its candidates.

    Args:
        candidates: ``[B, N, K]``, as `agreeing_patch` takes them.
        num_agreeing: likewise.
        form: likewise.

    Returns: float64 ``[B, N]``; each row sums to 1. With any backend in torch: K sorts.

    Raises:
        TypeError, ValueError: as `agreeing_patch`.
    """
    whole, fraction = split_power(_checked_power(candidates, num_agreeing, form))
    counts, _ = count_occurrences(candidates)
    shares = vote_weights(counts, whole, fraction, form == "factory")[0] / counts
    return shares / shares.sum(dim=1, keepdim=True)


def _checked_power(candidates: Tensor, num_agreeing: int | float | Tensor, form: str) -> Tensor:
    """The arguments checked; the s of each row, float64 ``[B]``, at least 1."""
    check_tensor("candidates", candidates)
    check_dtype("candidates", candidates, INTEGERS)
    if candidates.dim() != 3 or candidates.shape[1] == 0 or candidates.shape[2] == 0:
        raise ValueError(
            f"candidates must have shape [B, N, K] with N, K >= 1, got {tuple(candidates.shape)}"
        )
    if form not in ("factory", "gamma"):
        raise ValueError(f"form must be 'factory' or 'gamma', got {form!r}")
    return _power(num_agreeing, candidates)


def _checked_seed(seed: Seed, candidates: Tensor) -> Tensor:
    """`seed` as a tensor, with one row per row of `candidates` if it has rows."""
    seed = as_seed(seed, candidates.device)
    if seed.dim() == 2 and seed.shape[0] != candidates.shape[0]:
        raise ValueError(f"seed has {seed.shape[0]} rows for {candidates.shape[0]} of candidates")
    return seed


def _power(num_agreeing: int | float | Tensor, candidates: Tensor) -> Tensor:
    """The s of each row, float64 ``[B]``, at least 1."""
    batch, device = candidates.shape[0], candidates.device
    if not isinstance(num_agreeing, Tensor):
        number = _check_number(num_agreeing)
        return torch.full((), number, dtype=torch.float64, device=device).expand(batch)
    check_dtype("num_agreeing", num_agreeing, NUMBERS)
    check_device("num_agreeing", num_agreeing, "candidates", candidates)
    if num_agreeing.shape not in ((), (1,), (batch,)):
        raise ValueError(
            f"num_agreeing must hold one number or {batch}, one per row of candidates; "
            f"got shape {tuple(num_agreeing.shape)}"
        )
    if device.type == "cpu" and not torch.compiler.is_compiling():
        for value in num_agreeing.reshape(-1).tolist():
            _check_number(value)
    return num_agreeing.to(torch.float64).clamp(min=1.0).expand(batch)


def _check_number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"num_agreeing must be a number or a tensor, got {type(value).__name__}")
    if not 1.0 - TOLERANCE <= value < math.inf:
        raise ValueError(
            f"num_agreeing must be finite and at least 1 (it is 1/T with T in (0, 1]), got {value}"
        )
    return float(value)
