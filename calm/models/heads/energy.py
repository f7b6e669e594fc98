"""The energy head's loss; the head itself is `calm_kernels.EnergyHead`."""

from typing import ClassVar

from torch import Tensor, nn
from transformers import initialization as init

from calm.configuration import CALMConfig
from calm.models.heads.base import HeadLoss, Posterior, expand_rows, is_recomputed
from calm_kernels.energy_head import EnergyHead
from calm_kernels.energy_score import gaussian_energy_score
from calm_kernels.noise import Seed

__all__ = ["EnergyGenerativeHead"]


class EnergyGenerativeHead(EnergyHead):
    """Draws a latent in one step from a hidden state and uniform noise.

    The energy score trains it: no likelihood, and no gradient through a decoder.

    Source: CALM, sections 3.2 and 3.3.
    """

    entry_points: ClassVar[tuple[str, ...]] = ("sample",)
    gradient_checkpointing = False  # which transformers sets

    def __init__(self, config: CALMConfig) -> None:
        super().__init__(
            config.hidden_size, config.latent_size, config.noise_size, config.num_mlp_layers
        )
        self.config = config

    def initialize(self, module: nn.Module) -> None:
        """The last layer starts at zero, as published, or at N(0, 1 / width)."""
        if module is not self.output:
            return
        init.zeros_(module.bias)
        if self.config.head_init == "zero":
            init.zeros_(module.weight)
        else:
            init.normal_(module.weight, std=module.in_features**-0.5)

    def loss(
        self,
        hidden: Tensor,
        posterior: Posterior,
        *,
        head_noise: Tensor | None = None,
        target_noise: Tensor | None = None,
        seed: Seed = None,
        first_row: int | Tensor = 0,
    ) -> HeadLoss:
        """Energy loss of each chunk that counts, fidelity - diversity.

        fidelity = 2 mean_n E|x_n - y|^α,    diversity = mean_{n≠m} |x_n - x_m|^α

        Args:
            hidden: ``[B, S, H]``.
            posterior: distribution of y; no gradient reaches it.
            head_noise: ``[N, R, noise_size]`` for the R unmasked chunks or
                ``[N, B, S, noise_size]``, U[-1/2, 1/2). Drawn, num_samples a chunk, if None.
            target_noise: ``[M, R, L]`` or ``[M, B, S, L]``, N(0, 1); the targets are then sampled.
            seed: of draws that are not given.
            first_row: global index of the first chunk.
        """
        config, weight = self.config, posterior.weight
        noise, num_samples = None, config.num_samples
        if head_noise is not None:
            noise = _expand("head_noise", head_noise, weight, config.noise_size).to(hidden.dtype)
            num_samples = len(noise)
        samples = self.sample(
            hidden, noise, num_samples, seed, first_row,
            recompute=is_recomputed(self, config.head_recompute),
        )  # fmt: skip
        if target_noise is not None:
            target_noise = _expand("target_noise", target_noise, weight, config.latent_size)
        score, terms = gaussian_energy_score(
            samples, posterior.mean, posterior.log_std, exponent=float(config.beta),
            targets=config.targets, num_targets=config.num_targets, target_noise=target_noise,
            weight=weight, seed=seed, first_row=first_row, return_diagnostics=True,
        )  # fmt: skip
        # The score and its terms are weighted already.
        return HeadLoss(-score, terms.fidelity, terms.diversity, samples)


def _expand(name: str, draw: Tensor, weight: Tensor, width: int) -> Tensor:
    """`draw` for all chunks, ``[N, B, S, width]``, with N its first dimension."""
    return expand_rows(name, draw, weight, len(draw), width)
