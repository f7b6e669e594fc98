"""How good the latent space of an autoencoder is, on a text."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calm.evaluation.brier import evaluating
from calm.models import ContinuousTransformer
from calm_kernels.noise import Stream, as_seed, normal

__all__ = ["NOISE_SIZES", "LatentQuality", "latent_noise", "latent_quality"]

# Standard deviations of noise added to latents, in units of those of all latents of the text.
NOISE_SIZES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
SEED = 0


@dataclass(frozen=True)
class LatentQuality:
    """What `latent_quality` measures.

    Attributes:
        accuracy: share of tokens reconstructed from drawn latents, for each of `NOISE_SIZES`.
        collapsed: share of dimensions whose mean KL divergence is at most the floor.
        posterior_std: mean standard deviation of the posterior.
        spread: standard deviation of all latents, over chunks and dimensions: the unit of noise.
    """

    accuracy: dict[float, float]
    collapsed: float
    posterior_std: float
    spread: float


def latent_quality(model: ContinuousTransformer, blocks: Any) -> LatentQuality:
    """Reconstruction, collapse and spread of the autoencoder of `model` on `blocks`.

    Chunks count whose tokens all have labels.
    """
    ids = torch.stack([torch.as_tensor(block["input_ids"]) for block in blocks])
    labels = torch.stack([torch.as_tensor(block["labels"]) for block in blocks])
    chunks = ids.view(-1, model.patch_size)
    chunks = chunks[(labels.view(-1, model.patch_size) >= 0).all(-1)].to(model.device)  # [R, K]
    autoencoder: Any = model.ae_model
    with evaluating(model):
        mean, log_std = autoencoder.encoder(input_ids=chunks).squeeze(1).chunk(2, dim=-1)  # [R, L]
        drawn = mean + log_std.exp() * _noise(mean, Stream.LATENT)
        spread = drawn.std(0).square().mean().sqrt()
        added = _noise(mean, Stream.PATH) * spread
        accuracy = {
            size: float((model.decode_latents(drawn + size * added) == chunks).float().mean())
            for size in NOISE_SIZES
        }
    kl = 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std)
    return LatentQuality(
        accuracy=accuracy,
        collapsed=float(autoencoder.collapsed(kl.mean(0))),
        posterior_std=float(log_std.exp().mean()),
        spread=float(spread),
    )


@contextmanager
def latent_noise(model: ContinuousTransformer, std: float) -> Iterator[None]:
    """Inside it, every latent that the head draws has N(0, std²) noise added."""
    head: Any = model.generative_head
    draw = head.sample

    def noisy(hidden: Tensor, *args: Any, **options: Any) -> Tensor:
        latents: Tensor = draw(hidden, *args, **options)
        generator = torch.Generator(latents.device).manual_seed(SEED)
        return latents + std * torch.randn(
            latents.shape, generator=generator, device=latents.device, dtype=latents.dtype
        )

    head.sample = noisy
    try:
        yield
    finally:
        del head.sample


def _noise(like: Tensor, stream: Stream) -> Tensor:
    rows, width = like.shape
    return normal(rows, width, stream=stream, seed=as_seed(SEED, like.device), device=like.device)
