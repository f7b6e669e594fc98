"""Options of the autoencoder's latent, all off by default: `AutoencoderConfig` names them.

Shapes: B batch, P chunks of a sequence, L latent size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from calm.configuration import AutoencoderConfig
from calm_kernels.noise import Stream
from calm_kernels.uniform_draws import normal_draws

__all__ = ["mean_on_sphere", "noise_size", "on_sphere", "with_noise"]


def on_sphere(latents: Tensor) -> Tensor:
    """√L z / |z|: latents ``[..., L]`` on the sphere of radius √L, each its nearest point there.

    The length of N(0, 1) draws is about √L, too. Computed in float32 or wider; 0 stays 0.

    Source: SphereAR (arXiv 2509.24335), whose latents and predictions have one fixed length.
    """
    wide = latents.to(torch.promote_types(latents.dtype, torch.float32))
    return (latents.shape[-1] ** 0.5 * F.normalize(wide, dim=-1)).to(latents.dtype)


def mean_on_sphere(latent_states: Tensor) -> Tensor:
    """Mean and log std side by side, ``[..., 2L]``: the mean `on_sphere`, the log std as it is."""
    mean, log_std = latent_states.chunk(2, dim=-1)
    return torch.cat([on_sphere(mean), log_std], dim=-1)


def noise_size(config: AutoencoderConfig, progress: float) -> float:
    """Size s = decoder_noise · min(1, progress / decoder_noise_growth); of no growth all of it.

    Args:
        config: of the autoencoder.
        progress: share of the training that is done.
    """
    growth = float(config.decoder_noise_growth)
    return float(config.decoder_noise) * (min(1.0, progress / growth) if growth else 1.0)


def with_noise(
    latents: Tensor,
    size: float,
    noise: Tensor | None,
    seed: Tensor,
    first_row: int | Tensor,
) -> Tensor:
    """Latents z with noise, z + s ε, ε ~ N(0, 1).

    Args:
        latents: z, ``[B, P, L]``.
        size: s.
        noise: ε, ``[B*P, L]``; drawn if None.
        seed: of the draw, as `calm_kernels.noise.as_seed` gives it.
        first_row: index of the first chunk within the global batch.
    """
    rows, width = latents.numel() // latents.shape[-1], latents.shape[-1]
    if noise is None:
        noise = normal_draws(
            rows, width, stream=Stream.DECODER_NOISE, seed=seed, first_row=first_row,
            device=latents.device, dtype=latents.dtype,
        )  # fmt: skip
    elif noise.numel() != latents.numel() or noise.shape[-1] != width:
        raise ValueError(
            f"decoder_noise must have shape {(rows, width)}, a row per chunk, got "
            f"{tuple(noise.shape)}"
        )
    return latents + size * noise.reshape(latents.shape)
