"""How good the latent space of an autoencoder is, on a text."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calm.evaluation.brier import evaluating
from calm.models import ContinuousTransformer
from calm_kernels.noise import Stream, as_seed
from calm_kernels.uniform_draws import normal_draws

__all__ = [
    "NOISE_SIZES",
    "LatentQuality",
    "latent_noise",
    "latent_quality",
    "posteriors",
    "unconditional_energy",
]

# Standard deviations of noise added to latents, in units of those of all latents of the text.
NOISE_SIZES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
SEED = 0


@dataclass(frozen=True)
class LatentQuality:
    """What `latent_quality` measures.

    Attributes:
        accuracy: share of tokens reconstructed from drawn latents, for each of `NOISE_SIZES`.
        posterior_std: mean standard deviation of the posterior.
        spread: standard deviation of all latents, over chunks and dimensions: the unit of noise.
    """

    accuracy: dict[float, float]
    posterior_std: float
    spread: float


def latent_quality(model: ContinuousTransformer, blocks: Any) -> LatentQuality:
    """Reconstruction and spread of the autoencoder of `model`, over whole chunks of `blocks`."""
    chunks, mean, std = posteriors(model, blocks)
    drawn = mean + std * _noise(mean, Stream.LATENT)
    spread = drawn.std(0).square().mean().sqrt()
    added = _noise(mean, Stream.PATH) * spread
    accuracy = {
        size: float((model.decode_latents(drawn + size * added) == chunks).float().mean())
        for size in NOISE_SIZES
    }
    return LatentQuality(accuracy, float(std.mean()), float(spread))


def unconditional_energy(model: ContinuousTransformer, blocks: Any) -> float:
    """E|y - y'| of latents of different chunks of `blocks`.

    That is the energy loss of a head that draws latents as often as the text has them, whatever the
    context: what can be reached without reading.
    """
    _, mean, std = posteriors(model, blocks)
    drawn = mean + std * _noise(mean, Stream.LATENT)
    order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(SEED))
    shuffled = drawn[order.to(drawn.device)]
    return float((shuffled - shuffled.roll(1, dims=0)).norm(dim=-1).mean())


def posteriors(model: ContinuousTransformer, blocks: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The chunks of `blocks` whose tokens all have labels ``[R, K]``; mean and std ``[R, L]``."""
    size = model.patch_size
    rows = [(torch.as_tensor(block["input_ids"]), torch.as_tensor(block["labels"]))
            for block in blocks]  # fmt: skip
    ids, labels = (torch.cat(column).view(-1, size) for column in zip(*rows, strict=True))
    chunks = ids[(labels >= 0).all(-1)].to(model.device)
    autoencoder: Any = model.ae_model
    with evaluating(model):
        states = autoencoder.encoder(input_ids=chunks).squeeze(1).float()
    mean, log_std = states.chunk(2, dim=-1)
    return chunks, mean, log_std.exp()


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
    return normal_draws(
        rows, width, stream=stream, seed=as_seed(SEED, like.device), device=like.device
    )
