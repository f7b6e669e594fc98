"""The public function: check the arguments, choose the backend, call it."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from calm_kernels import noise as noise_source
from calm_kernels.backend import Backend, resolve
from calm_kernels.checks import (
    check_device,
    check_dtype,
    check_integer,
    check_shape,
    check_tensor,
)
from calm_kernels.energy_head.eager import energy_head_eager
from calm_kernels.energy_head.parameters import (
    gather_parameters,
    parameters_by_name,
)
from calm_kernels.energy_head.reference import energy_head_reference
from calm_kernels.noise import Seed, Stream
from calm_kernels.precision import matmul_dtype

__all__ = ["energy_head"]

# A row of this many features fits into the registers of a program, noise into those of a matmul.
TRITON_MAX_WIDTH, TRITON_MAX_NOISE = 4096, 256


def energy_head(
    hidden: Tensor,
    noise: Tensor | None,
    parameters: nn.Module | Mapping[str, Tensor],
    *,
    num_samples: int | None = None,
    seed: Seed = None,
    first_row: int | Tensor = 0,
    noise_scale: float = 1.0,
    recompute: bool = False,
    backend: Backend | str = Backend.AUTO,
) -> Tensor:
    """Latents of the generative head for given or drawn noise.

    e₀ = LN(W_n noise + b_n),    c = LN(W_h hidden + b_h)
    in each block: [g; u] = W₃ SiLU(W₂ SiLU(W₁ [LN(e); c] + b₁) + b₂) + b₃
                   e ← e + W_d (SiLU(g) ⊙ u) + b_d
    latent = W_o SiLU(W_f LN(e) + b_f) + b_o

    Args:
        hidden: ``[..., H]``, any float dtype; H is the head's width C; differentiable.
        noise: one draw a row ``[..., Z]`` or N draws a row ``[N, ..., Z]``, already centred
            (U[-1/2, 1/2)); cast to the dtype of `hidden`, differentiable. None draws it.
        parameters: an `EnergyHead`, or its parameters by their published names, in the dtype of
            `hidden` unless autocast is on; differentiable.
        num_samples: N draws a row of noise that is drawn; None for one, without the leading axis.
            Given noise must have as many, if it is not None.
        seed: of drawn noise, see `noise.as_seed`; row r of `hidden` is row ``first_row + r``.
        first_row: global index of the first row.
        noise_scale: factor on the noise, >= 0; 0 is deterministic.
        recompute: keep one array a block for the backward pass instead of all, and compute the
            others again.
        backend: see `calm_kernels.backend`. Triton keeps the residual stream in float32 whatever
            the dtype of the matmuls, and draws the noise in its kernels.

    Returns: ``[..., L]`` or ``[N, ..., L]``; the latter is a view of memory in which the draws of a
        row are neighbours.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device, shape or range, or a
            parameter missing.

    Source: CALM, section 3.3.3. Cost of D blocks in multiplications: 6 D C² a draw as published; in
        the other backends 5 D C² a draw and D C² a row, because c and its half of W₁ do not depend
        on the noise.
    """
    check_tensor("hidden", hidden, min_dim=1)
    check_dtype("hidden", hidden)
    named = parameters_by_name(parameters) if isinstance(parameters, nn.Module) else parameters
    head = gather_parameters(named)
    weight = head.noise_embd.weight
    width, noise_size = weight.shape
    lead = hidden.shape[:-1]
    check_shape("hidden", hidden, (*lead, width), "the head's width comes last")
    check_device("parameters", weight, "hidden", hidden)
    dtype = matmul_dtype("parameters", weight, "hidden", hidden)
    if not (noise_scale >= 0.0 and math.isfinite(noise_scale)):
        raise ValueError(f"noise_scale must be finite and at least 0, got {noise_scale}")
    count = _check_draws(noise, num_samples, hidden, noise_size)
    chosen = resolve(backend, "energy_head", hidden, obstacle=_obstacle(dtype, width, noise_size))

    rows = hidden.reshape(-1, width)
    draws = 1 if count is None else count
    if noise is not None:
        noise = noise.reshape(draws, len(rows), noise_size)
        noise = noise if noise_scale == 1.0 else noise * noise_scale
    drawing = (draws, seed, first_row, noise_scale)
    match chosen:
        case Backend.REFERENCE:
            noise = _draw(rows, noise_size, *drawing) if noise is None else noise
            latent = energy_head_reference(rows, noise, named, recompute)
        case Backend.TRITON:
            from calm_kernels.energy_head.function import energy_head_triton

            latent = energy_head_triton(rows, noise, head, recompute, dtype, *drawing)
        case _:
            noise = _draw(rows, noise_size, *drawing) if noise is None else noise
            latent = energy_head_eager(rows, noise, head, recompute)
    latent = latent.unflatten(1, lead) if lead else latent[:, 0]
    return latent[0] if count is None else latent


def _check_draws(
    noise: Tensor | None, num_samples: int | None, hidden: Tensor, noise_size: int
) -> int | None:
    """Draws a row, None for one without a leading axis."""
    if num_samples is not None:
        check_integer("num_samples", num_samples, 0)
    if noise is None:
        return num_samples
    check_tensor("noise", noise, min_dim=1)
    check_dtype("noise", noise)
    check_device("noise", noise, "hidden", hidden)
    has_draws = noise.dim() == hidden.dim() + 1
    count = noise.shape[0] if has_draws else None
    if num_samples is not None and num_samples != count:
        raise ValueError(
            f"noise must hold num_samples={num_samples} draws for every row of hidden "
            f"{tuple(hidden.shape)}, got shape {tuple(noise.shape)}"
        )
    lead = hidden.shape[:-1]
    expected = (count, *lead, noise_size) if count is not None else (*lead, noise_size)
    check_shape("noise", noise, expected, "[..., Z] or [N, ..., Z] for hidden [..., H]")
    return count


def _obstacle(dtype: torch.dtype, width: int, noise_size: int) -> str | None:
    """Why the kernels cannot take these arguments, None if they can."""
    if dtype == torch.float64:
        return "computes in float32 and takes no float64 input"
    if width > TRITON_MAX_WIDTH:
        return f"takes widths up to {TRITON_MAX_WIDTH}, got {width}"
    if noise_size > TRITON_MAX_NOISE:
        return f"takes noise sizes up to {TRITON_MAX_NOISE}, got {noise_size}"
    return None


def _draw(
    rows: Tensor, noise_size: int, draws: int, seed: Seed, first_row: int | Tensor, scale: float
) -> Tensor:
    """U[-1/2, 1/2) times `scale`, ``[N, R, Z]``."""
    drawn = noise_source.uniform(
        len(rows), noise_size, stream=Stream.HEAD, seed=seed, num_draws=draws,
        first_row=first_row, device=rows.device,
    )  # fmt: skip
    drawn = (drawn - 0.5).to(rows.dtype)
    return drawn if scale == 1.0 else drawn * scale
