"""The flow-matching head: a straight path from normal noise to the latent."""

from collections.abc import Callable

import torch
from torch import Tensor

from calm.configuration import CALMConfig
from calm.models.heads.denoising import DenoisingHead

__all__ = ["FlowHead"]

NUM_STEPS = 10
TIME_SCALE = 1000  # the network sees floor(1000 t)


class FlowHead(DenoisingHead):
    """Velocity of the path x_t = (1 - t) x₀ + t z from x₀ ~ N(0, 1) to the latent z.

    loss = mean_i (v_i(x_t, t, h) - (z - x₀)_i)²,    t ~ U[0, 1)

    Sampling takes 10 midpoint steps (20 evaluations), or ``sampling_steps``, or Euler's, with one
    evaluation each (``flow_sampler``). Source: CALM, section 7.4; Lipman et al., 2023.
    """

    def __init__(self, config: CALMConfig) -> None:
        super().__init__(config, out_channels=config.latent_size)

    @property
    def num_steps(self) -> int:
        """Steps of sampling."""
        return self.config.sampling_steps or NUM_STEPS

    @property
    def num_evaluations(self) -> int:
        """Two a midpoint step, one an Euler step."""
        return self.num_steps * (2 if self.config.flow_sampler == "midpoint" else 1)

    def _velocity(self, latent: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """Velocity ``[..., L]`` at latents ``[..., L]`` and times ``[...]``."""
        step = (time * TIME_SCALE).floor()
        return self.net(latent.to(condition.dtype), step, condition).float()

    def _times(self, fraction: Tensor) -> Tensor:
        return fraction

    def _row_loss(self, latent: Tensor, time: Tensor, noise: Tensor, condition: Tensor) -> Tensor:
        t = time[..., None]
        velocity = self._velocity((1 - t) * noise + t * latent, time, condition)
        return (velocity - (latent - noise)).square().mean(-1)

    def _walk(self, condition: Tensor, draw: Callable[[int], Tensor]) -> Tensor:
        latent = draw(0)
        step = 1.0 / self.num_steps
        for index in range(self.num_steps):
            time = torch.full((), index * step, device=latent.device)
            velocity = self._velocity(latent, time, condition)
            if self.config.flow_sampler == "midpoint":
                middle = latent + 0.5 * step * velocity
                velocity = self._velocity(middle, time + 0.5 * step, condition)
            latent = latent + step * velocity
        return latent
