"""The public function: check the arguments, choose the backend, call it."""

import math

import torch
from torch import Tensor

from calm_kernels.backend import Backend, resolve
from calm_kernels.checks import (
    check_device,
    check_dtype,
    check_integer,
    check_tensor,
)
from calm_kernels.noise import Seed, Stream, as_seed, check_draws, uniform
from calm_kernels.softmax_draws.eager import softmax_draws_eager
from calm_kernels.softmax_draws.reference import softmax_draws_reference

__all__ = ["softmax_draws"]

COLDEST = 1e-30  # T at which each chance has long been 0 or 1, and float32 holds logits / T


def softmax_draws(
    logits: Tensor,
    uniforms: Tensor | None = None,
    *,
    temperature: float = 1.0,
    num_draws: int = 1,
    seed: Seed = None,
    stream: Stream = Stream.VOTE,
    backend: Backend | str = Backend.AUTO,
) -> tuple[Tensor, Tensor]:
    """Tokens drawn from softmax(logits / T), no top-k or top-p.

    token = first v with Σ_{w ≤ v} exp(x_w) > u Σ_w exp(x_w),    x = logits / T

    A token of probability 0 is never drawn. T = 0 takes the first of the largest logits.

    Args:
        logits: ``[R, V]``, V >= 1, any float dtype; computed in float32, summed in float64.
        uniforms: u, N >= 1 draws for each row from the uniform distribution on [0, 1),
            float64 ``[R, N]``. None draws them, as `uniform_draws` does for rows of one element.
        temperature: T >= 0; below 1e-30 as at 1e-30.
        num_draws: N >= 1, of uniforms that are drawn.
        seed: likewise, see `calm_kernels.noise.as_seed`.
        stream: likewise, what the draws are for.
        backend: see `calm_kernels.backend`. All draw the same tokens, unless u is within rounding
            of where one token ends and the next begins.

    Returns: tokens, int64 ``[R, N]``, and whether all logits / T were finite, bool ``[R]``; where
        not, tokens are any in the vocabulary. Nothing is differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device, shape or range.

    Cost: in Triton two launches, which read the logits once; in torch a dozen operations on
        ``[R, V]``.
    """
    check_tensor("logits", logits)
    check_dtype("logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must have shape [R, V] with V >= 1, got {tuple(logits.shape)}")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
    temperature = max(temperature, COLDEST) if temperature > 0 else 0.0
    rows, seeds = len(logits), None
    if uniforms is not None:
        check_tensor("uniforms", uniforms)
        check_dtype("uniforms", uniforms, (torch.float64,))
        if uniforms.dim() != 2 or len(uniforms) != rows or uniforms.shape[1] == 0:
            raise ValueError(
                f"uniforms must have shape [{rows}, N] with N >= 1, got {tuple(uniforms.shape)}"
            )
        check_device("uniforms", uniforms, "logits", logits)
    else:
        check_integer("num_draws", num_draws, 1)
        seeds = as_seed(seed, logits.device)
        check_draws(seeds, rows, 1, num_draws, 0, 0)
    logits = logits.detach()
    chosen = resolve(backend, "softmax_draws", logits)
    if chosen is Backend.TRITON:
        from calm_kernels.softmax_draws.function import softmax_draws_triton

        return softmax_draws_triton(logits, uniforms, seeds, num_draws, int(stream), temperature)
    if uniforms is None:
        uniforms = uniform(
            rows, 1, stream=stream, seed=seeds, num_draws=num_draws, device=logits.device,
            dtype=torch.float64,
        )[..., 0].T  # fmt: skip
    if chosen is Backend.REFERENCE:
        return softmax_draws_reference(logits, uniforms, temperature)
    return softmax_draws_eager(logits, uniforms.contiguous(), temperature)
