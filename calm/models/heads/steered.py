"""An energy head that draws its noise from a learned density instead of the uniform one."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from calm.configuration import CALMConfig
from calm.models.heads.base import noise_factor
from calm.models.heads.energy import EnergyGenerativeHead
from calm_kernels.backend import Backend
from calm_kernels.noise import Seed, Stream
from calm_kernels.uniform_draws import uniform_draws

__all__ = ["SteeredHead"]

HALF_STEP = 2.0**-25  # half of what separates two uniform draws: keeps them inside of (0, 1)


class SteeredHead(EnergyGenerativeHead):
    """An energy head and a density of its noise, given the hidden state.

    ε = μ(h) + exp(s(h)) g,    g ~ N(0, 1),    noise = Φ(ε) - 1/2,    (μ, s) = W h + b

    with Φ the distribution function of N(0, 1). W and b start at zero: noise is then uniform on
    (-1/2, 1/2), as that of an `EnergyGenerativeHead`. The density of ε is known, so that a policy
    gradient can train it whatever the head and the decoder do with the noise. Two densities of
    `noise` have the same ratio as those of ε: the slope of Φ is the same in both.

    Shapes: N draws, Z elements of noise, H hidden size, L latent size.

    Source: Wagenmaker et al., arXiv 2506.15799, steer a frozen flow through its noise likewise.
    """

    entry_points: ClassVar[tuple[str, ...]] = ("sample", "policy")

    def __init__(self, config: CALMConfig) -> None:
        super().__init__(config)
        self.noise_policy = nn.Linear(config.hidden_size, 2 * config.noise_size)

    def initialize(self, module: nn.Module) -> None:
        """As the head's; the density starts as that of uniform noise."""
        super().initialize(module)
        if module is self.noise_policy:
            init.zeros_(module.weight)
            init.zeros_(module.bias)

    def start_from(self, head: EnergyGenerativeHead) -> None:
        """Take the weights of `head`; the density becomes that of uniform noise."""
        self.load_state_dict(head.state_dict(), strict=False)  # all but the policy
        nn.init.zeros_(self.noise_policy.weight)
        nn.init.zeros_(self.noise_policy.bias)

    def policy(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """μ and s of hidden states ``[..., H]``, float32 ``[..., Z]`` each."""
        mean, log_std = self.noise_policy(hidden).float().chunk(2, dim=-1)
        return mean, log_std

    def draw(
        self,
        hidden: Tensor,
        num_samples: int | None = None,
        seed: Seed = None,
        first_row: int | Tensor = 0,
        factor: float = 1.0,
    ) -> Tensor:
        """ε for hidden states ``[..., H]``: float32 ``[..., Z]`` or ``[num_samples, ..., Z]``.

        Differentiable in the policy. Draws are addressed as those of `EnergyHead.sample`. `factor`
        multiplies the deviation exp(s): 1 for the density, 0 for its mean.
        """
        mean, log_std = self.policy(hidden)
        rows = hidden.shape[:-1].numel()
        uniform = uniform_draws(
            rows, self.noise_size, stream=Stream.HEAD, seed=seed, num_draws=num_samples,
            first_row=first_row, device=hidden.device,
        )  # fmt: skip
        normal = math.sqrt(2) * torch.erfinv(2 * (uniform - 0.5 + HALF_STEP))
        lead = () if num_samples is None else (num_samples,)
        return mean + factor * log_std.exp() * normal.reshape(*lead, *mean.shape)

    def log_density(self, drawn: Tensor, hidden: Tensor) -> Tensor:
        """Logarithm of the density N(ε; μ(h), exp(2 s(h))), summed over Z, float32.

        Args:
            drawn: ε, ``[..., Z]`` or ``[N, ..., Z]``.
            hidden: ``[..., H]``.
        """
        mean, log_std = self.policy(hidden)
        standard = (drawn - mean) * (-log_std).exp()
        return (-standard.square() / 2 - log_std - math.log(2 * math.pi) / 2).sum(-1)

    @staticmethod
    def as_noise(drawn: Tensor) -> Tensor:
        """What the head takes for ε: Φ(ε) - 1/2."""
        return torch.erf(drawn * math.sqrt(0.5)) / 2

    def sample(
        self,
        hidden: Tensor,
        noise: Tensor | None = None,
        num_samples: int | None = None,
        seed: Seed = None,
        first_row: int | Tensor = 0,
        noise_scale: float = 1.0,
        *,
        noise_spread: float = 1.0,
        recompute: bool = False,
        backend: Backend | str = Backend.AUTO,
    ) -> Tensor:
        """As `EnergyHead.sample`; fresh noise comes from the density, given noise stays.

        Of fresh noise both `noise_scale` and `noise_spread` multiply exp(s), so that draws narrow
        towards those of the mean that was learned, ε = μ(h), and not towards those of noise 0.
        """
        if noise is None:
            factor = noise_factor(noise_scale, noise_spread)
            drawn = self.draw(hidden, num_samples, seed, first_row, factor)
            noise, noise_scale, noise_spread = self.as_noise(drawn).to(hidden.dtype), 1.0, 1.0
        return super().sample(
            hidden, noise, num_samples, seed, first_row, noise_scale,
            noise_spread=noise_spread, recompute=recompute, backend=backend,
        )  # fmt: skip
