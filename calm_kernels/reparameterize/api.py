"""The public function: check the arguments, choose the backend, call it."""

import math

import torch
from torch import Tensor

from calm_kernels import noise
from calm_kernels.backend import Backend, resolve
from calm_kernels.checks import check_device, check_dtype, check_fraction, check_tensor
from calm_kernels.noise import Seed, Stream, as_seed
from calm_kernels.precision import accumulation_dtype
from calm_kernels.reparameterize.eager import reparameterize_eager
from calm_kernels.reparameterize.reference import reparameterize_reference

__all__ = ["reparameterize"]

# A row of this latent size fits into the registers of a program.
TRITON_MAX_LATENT = 4096


def reparameterize(
    latent_states: Tensor,
    *,
    kl_floor: float,
    dropout: float = 0.0,
    latent_noise: Tensor | None = None,
    latent_keep: Tensor | None = None,
    seed: Seed = None,
    first_row: int | Tensor = 0,
    backend: Backend | str = Backend.AUTO,
) -> tuple[Tensor, Tensor]:
    """A draw from the autoencoder's posterior, and its KL divergence with a floor per dimension.

    latent = keep / (1 - dropout) * (mean + exp(log_std) * ε),    ε ~ N(0, 1)
    kl     = Σ_d max((mean² + exp(2 log_std) - 1) / 2 - log_std, kl_floor)

    Args:
        latent_states: mean and log_std side by side, ``[..., 2L]``, any float dtype.
            Differentiable; a dimension below the floor gets no gradient from the KL, one at the
            floor does (as `torch.clamp`).
        kl_floor: λ_KL >= 0.
        dropout: chance in [0, 1) that an element of the latent becomes 0; the others are scaled up.
        latent_noise: ε, ``[..., L]``; leading axes are free, rows count in row-major order. Drawn
            if None.
        latent_keep: kept elements, bool, ``[..., L]`` likewise. Drawn if None and ``dropout > 0``.
        seed: of the draws that are not given, see `noise.as_seed`; row r of this call is row
            ``first_row + r``.
        first_row: global index of the first row.
        backend: see `calm_kernels.backend`.

    Returns: latent ``[..., L]`` in the dtype of `latent_states`, kl ``[...]`` in float32 (float64
        for float64).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device, shape or range.

    Source: CALM, section 2, equations 1 to 4, and its dropout of latents. Cost: elementwise; for
        the backward pass the torch backend keeps its inputs alone, Triton only the states and seed.
    """
    check_tensor("latent_states", latent_states, min_dim=1)
    check_dtype("latent_states", latent_states)
    width = latent_states.shape[-1]
    if width == 0 or width % 2:
        raise ValueError(
            f"latent_states must have an even last dimension (mean, log_std), got {width}"
        )
    if not (kl_floor >= 0.0 and math.isfinite(kl_floor)):
        raise ValueError(f"kl_floor must be finite and at least 0, got {kl_floor}")
    dropout = check_fraction("dropout", dropout)
    latent_size = width // 2
    chosen = resolve(
        backend, "reparameterize", latent_states, obstacle=_obstacle(latent_states, latent_size)
    )
    shape = (*latent_states.shape[:-1], latent_size)
    if latent_noise is not None:
        check_dtype("latent_noise", latent_noise)
        latent_noise = _reshaped("latent_noise", latent_noise, latent_states, shape).detach()
    if latent_keep is not None:
        check_dtype("latent_keep", latent_keep, (torch.bool,))
        latent_keep = _reshaped("latent_keep", latent_keep, latent_states, shape)
    is_drawn = latent_noise is None or (latent_keep is None and dropout > 0)
    seed = as_seed(seed, latent_states.device) if is_drawn else None
    rows = math.prod(shape[:-1])
    if seed is not None and seed.dim() == 2 and seed.shape[0] != rows:
        raise ValueError(f"seed must have one row per row of latents, {rows}; got {seed.shape[0]}")
    given = (latent_noise, latent_keep)
    match chosen:
        case Backend.REFERENCE:
            epsilon, keep = _draws(*given, latent_states, shape, dropout, seed, first_row)
            return reparameterize_reference(latent_states, epsilon, keep, kl_floor, dropout)
        case Backend.TRITON:
            from calm_kernels.reparameterize.function import reparameterize_triton

            return reparameterize_triton(latent_states, *given, kl_floor, dropout, seed, first_row)
        case _:
            epsilon, keep = _draws(*given, latent_states, shape, dropout, seed, first_row)
            return reparameterize_eager(latent_states, epsilon, keep, kl_floor, dropout)


def _obstacle(latent_states: Tensor, latent_size: int) -> str | None:
    """Why the kernels cannot take these states, None if they can."""
    if latent_states.dtype == torch.float64:
        return "computes in float32 and takes no float64 input"
    if latent_size > TRITON_MAX_LATENT:
        return f"takes latent sizes up to {TRITON_MAX_LATENT}, got {latent_size}"
    return None


def _draws(
    epsilon: Tensor | None, keep: Tensor | None, like: Tensor, shape: tuple[int, ...],
    dropout: float, seed: Tensor | None, first_row: int | Tensor,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """ε in the dtype of the sums and kept elements, of `shape`; what is not given is drawn.

    Kept elements are None without dropout: all are kept.
    """
    num_rows, width, dtype = math.prod(shape[:-1]), shape[-1], accumulation_dtype(like.dtype)
    if epsilon is None:
        epsilon = noise.normal(
            num_rows, width, stream=Stream.LATENT, seed=seed, first_row=first_row,
            device=like.device, dtype=dtype,
        ).view(shape)  # fmt: skip
    if keep is None and dropout > 0.0:
        drawn = noise.uniform(
            num_rows, width, stream=Stream.LATENT_KEEP, seed=seed, first_row=first_row,
            device=like.device,
        )  # fmt: skip
        keep = (drawn >= dropout).view(shape)
    return epsilon.to(dtype), keep


def _reshaped(name: str, draw: Tensor, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`draw` as `shape`, whatever its leading axes, if it has the same rows."""
    check_device(name, draw, "latent_states", like)
    if draw.shape[-1:] != shape[-1:] or draw.numel() != math.prod(shape):
        raise ValueError(
            f"{name} must have {math.prod(shape[:-1])} rows of {shape[-1]}, one per row of "
            f"latent_states; got shape {tuple(draw.shape)}"
        )
    return draw.reshape(shape)
