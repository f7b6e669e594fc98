"""The diffusion head: DDPM with learned variances on a cosine schedule."""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from calm.configuration import CALMConfig
from calm.models.heads.denoising import DenoisingHead

__all__ = ["DiffusionHead", "Schedule", "cosine_betas", "schedule"]

TRAIN_STEPS = 1000
SAMPLE_STEPS = 100
MAX_BETA = 0.999


def cosine_betas(num_steps: int) -> Tensor:
    """β_t = min(1 - a((t + 1)/T) / a(t/T), 0.999), float64 ``[T]``.

    a(u) = cos²((u + 0.008) / 1.008 · π/2)
    """
    u = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    signal = torch.cos((u + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - signal[1:] / signal[:-1]).clamp(max=MAX_BETA)


class Schedule(NamedTuple):
    """Coefficients of each step, ``[T]``.

    With ᾱ the product of 1 - β up to and including the step, and ᾱ' the one before it:

    Attributes:
        signal: √ᾱ, of z in x_t = signal z + noise ε.
        noise: √(1 - ᾱ).
        log_beta: log β, the larger end of the learned log variance.
        log_posterior: log β(1 - ᾱ')/(1 - ᾱ), the smaller end; at step 0, where it is -∞, that of
            step 1.
        from_latent: weight of z in the mean of x_{t-1} given z and x_t.
        from_noisy: weight of x_t in it.
    """

    signal: Tensor
    noise: Tensor
    log_beta: Tensor
    log_posterior: Tensor
    from_latent: Tensor
    from_noisy: Tensor

    def at(self, step: int | Tensor) -> "Schedule":
        """The coefficients of one step, or of integer steps ``[...]``, each ``[..., 1]``."""
        return Schedule(*(column[step][..., None] for column in self))

    def latent(self, noisy: Tensor, epsilon: Tensor) -> Tensor:
        """The latent z of x_t and ε."""
        return (noisy - self.noise * epsilon) / self.signal

    def previous_mean(self, latent: Tensor, noisy: Tensor) -> Tensor:
        """Mean of x_{t-1} given z and x_t."""
        return self.from_latent * latent + self.from_noisy * noisy

    def log_variance(self, interpolation: Tensor) -> Tensor:
        """The network's variance output in [-1, 1] as a log variance between the two ends."""
        share = (interpolation + 1) / 2
        return share * self.log_beta + (1 - share) * self.log_posterior


def schedule(betas: Tensor) -> Schedule:
    """The `Schedule` of float64 `betas`, in float64."""
    product = torch.cumprod(1 - betas, dim=0)
    before = torch.cat([torch.ones_like(product[:1]), product[:-1]])
    variance = betas * (1 - before) / (1 - product)
    return Schedule(
        signal=product.sqrt(),
        noise=(1 - product).sqrt(),
        log_beta=betas.log(),
        log_posterior=torch.cat([variance[1:2], variance[1:]]).log(),
        from_latent=betas * before.sqrt() / (1 - product),
        from_noisy=(1 - before) * (1 - betas).sqrt() / (1 - product),
    )


@cache
def _train_schedule(device: torch.device) -> Schedule:
    return Schedule(*(c.float().to(device) for c in schedule(cosine_betas(TRAIN_STEPS))))


@cache
def _sample_schedule(device: torch.device, count: int) -> tuple[list[int], Schedule]:
    """The `count` training steps that the sampler visits, and the schedule with those strides."""
    stride = (TRAIN_STEPS - 1) / (count - 1)
    steps = [round(index * stride) for index in range(count)]
    product = torch.cumprod(1 - cosine_betas(TRAIN_STEPS), dim=0)[steps]
    before = torch.cat([torch.ones_like(product[:1]), product[:-1]])
    return steps, Schedule(*(c.float().to(device) for c in schedule(1 - product / before)))


class DiffusionHead(DenoisingHead):
    """Predicts the noise ε and an interpolation of the log variance.

    loss = mean_i (ε - ε̂)_i² + vb, with vb the variational bound of the step in bits, averaged over
    dimensions, in which ε̂ is detached: KL(q(x_{t-1} | x_t, z) || p), at step 0 the discretised
    negative log-likelihood.

    1000 training steps, 100 sampling steps, or ``sampling_steps``. Source: CALM, section 7.4;
    Nichol and Dhariwal, 2021.
    """

    def __init__(self, config: CALMConfig) -> None:
        super().__init__(config, out_channels=2 * config.latent_size)

    @property
    def num_evaluations(self) -> int:
        """One a step."""
        return self.config.sampling_steps or SAMPLE_STEPS

    @property
    def num_path_draws(self) -> int:
        """One a step."""
        return self.num_evaluations

    def _predict(self, noisy: Tensor, step: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Noise and variance interpolation, ``[..., L]`` each."""
        prediction = self.net(noisy.to(condition.dtype), step, condition).float()
        epsilon, interpolation = prediction.chunk(2, dim=-1)
        return epsilon, interpolation

    def _times(self, fraction: Tensor) -> Tensor:
        return (fraction * TRAIN_STEPS).long()

    def _row_loss(self, latent: Tensor, time: Tensor, noise: Tensor, condition: Tensor) -> Tensor:
        at = _train_schedule(condition.device).at(time)
        noisy = at.signal * latent + at.noise * noise
        epsilon, interpolation = self._predict(noisy, time, condition)
        mean = at.previous_mean(at.latent(noisy, epsilon.detach()), noisy)
        log_variance = at.log_variance(interpolation)
        bound = torch.where(
            time[..., None] == 0,
            -discretised_log_likelihood(latent, mean, 0.5 * log_variance),
            gaussian_kl(at.previous_mean(latent, noisy), at.log_posterior, mean, log_variance),
        )
        return ((noise - epsilon).square() + bound / math.log(2.0)).mean(-1)

    def _walk(self, condition: Tensor, draw: Callable[[int], Tensor]) -> Tensor:
        count = self.num_evaluations
        steps, table = _sample_schedule(condition.device, count)
        noisy = draw(0)
        for index in reversed(range(count)):
            at = table.at(index)
            step = torch.full((), steps[index], device=noisy.device)
            epsilon, interpolation = self._predict(noisy, step, condition)
            noisy = at.previous_mean(at.latent(noisy, epsilon), noisy)
            if index > 0:
                std = (0.5 * at.log_variance(interpolation)).exp()
                noisy = noisy + std * draw(count - index)
        return noisy


def gaussian_kl(
    mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor
) -> Tensor:
    """KL divergence of one normal from another, elementwise, in nats."""
    difference = log_variance - other_log_variance
    distance = (mean - other_mean).square() * torch.exp(-other_log_variance)
    return 0.5 * (difference.exp() - 1 - difference + distance)


def discretised_log_likelihood(value: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log of a normal's mass in value ± 1/255, open-ended beyond ±0.999, elementwise."""

    def distribution(offset: float) -> Tensor:  # tanh approximation of the normal's
        scaled = (value - mean + offset) * torch.exp(-log_std)
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (scaled + 0.044715 * scaled**3)))

    upper, lower = distribution(1 / 255), distribution(-1 / 255)
    mass = torch.where(value < -0.999, upper, torch.where(value > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()
