"""The continuous autoregressive language models, one for each head."""

from copy import deepcopy
from typing import ClassVar, cast

from torch import Tensor, nn

from calm.configuration import CALMConfig
from calm.errors import UserError
from calm.models.continuous import ContinuousTransformer
from calm.models.heads.diffusion import DiffusionHead
from calm.models.heads.energy import EnergyGenerativeHead
from calm.models.heads.flow import FlowHead
from calm.models.heads.steered import SteeredHead
from calm.models.heads.tempered import TemperedHead, in_range
from calm.models.output import CALMOutput
from calm_kernels.noise import Seed

__all__ = ["MODEL_CLASSES", "DiffusionTransformer", "EnergyTransformer", "FlowTransformer"]


class EnergyTransformer(ContinuousTransformer):
    """Language model with the one-step energy head, trained with the energy score.

    The head is registered and saved as ``mlp_generator``; `generative_head` is the same head.

    Attributes:
        tempered_head: with ``tempered_range``, a second head that draws at these T; else None.

    Source: CALM, section 3.
    """

    head_type = "energy"
    aliases: ClassVar[dict[str, str]] = {
        **ContinuousTransformer.aliases,
        r"^generative_head\.": "mlp_generator.",
    }

    def _build_head(self, config: CALMConfig) -> None:
        head_class = SteeredHead if config.noise_policy else EnergyGenerativeHead
        self.mlp_generator = head_class(config)
        self.tempered_head = TemperedHead(config) if config.tempered_range else None

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if self.tempered_head is not None:
            self.tempered_head.initialize(module)

    def add_tempered_head(self, bounds: tuple[float, float]) -> TemperedHead:
        """A head for T between `bounds`, saved with the model: its own, or a copy of its head.

        Args:
            bounds: least and largest T, 0 < least <= largest < 1. Where the model has such a head,
                they replace those it was trained for, and its noise is spread as in training.

        Raises:
            UserError: no such range; the head draws its noise from a learned density, which a copy
                of it would lack.
        """
        if isinstance(self.mlp_generator, SteeredHead):
            raise UserError(
                "noise_policy must be false for a model that learns temperatures, whose new head "
                "would start without the learned density of the noise; got True, as after "
                "`calm post-train --method policy`"
            )
        config = cast(CALMConfig, deepcopy(self.config))
        config.tempered_range, config.tempered_spread = list(bounds), None
        config.validate_architecture()
        self.config.tempered_range, self.config.tempered_spread = config.tempered_range, None
        if self.tempered_head is None:
            self.tempered_head = TemperedHead(config).to(self.device, self.dtype)
            self.tempered_head.start_from(self.mlp_generator)
            self.tempered_head.train(self.training)
        return self.tempered_head

    def add_noise_policy(self) -> SteeredHead:
        """The head with a density of its noise, saved with the model: its own, or a new one.

        A new one starts as uniform noise: the model draws what it drew, up to rounding.
        """
        if not isinstance(self.mlp_generator, SteeredHead):
            steered = SteeredHead(cast(CALMConfig, self.config)).to(self.device, self.dtype)
            steered.start_from(self.mlp_generator)
            self.mlp_generator = steered.train(self.training)
            self.config.noise_policy = True
        return self.mlp_generator

    def head_at(self, temperature: float) -> TemperedHead:
        """The head that draws at this T below 1; `UserError` outside of its range."""
        bounds = self.config.tempered_range
        if self.tempered_head is None:
            raise UserError(
                f"temperature {temperature} of method 'amortized' needs a head that has learned "
                "it, which this model lacks: run `calm distill-temperature`"
            )
        if not in_range(temperature, bounds):
            raise UserError(
                f"temperature of method 'amortized' must be 1 or lie in [{bounds[0]:g}, "
                f"{bounds[1]:g}], which this model's head was trained for; got {temperature}"
            )
        return self.tempered_head

    @property
    def generative_head(self) -> EnergyGenerativeHead:  # type: ignore[override] # never assigned
        """The head."""
        return self.mlp_generator

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        loss_counts: Tensor | None = None,
        head_noise: Tensor | None = None,
        target_noise: Tensor | None = None,
        seed: Seed = None,
        first_row: int | Tensor = 0,
        progress: float = 1.0,
    ) -> CALMOutput:
        """Energy loss of the next latents; in evaluation and for K >= 4 also Brier-1 to Brier-4.

        Args:
            input_ids: ``[B, P*K]`` int64.
            labels: usually the same, -100 where they do not count (a chunk is masked if its first
                label is -100). None for hidden states alone.
            loss_counts: `loss_counts` of all the batches that this one belongs to, ``[1]``. Their
                losses then add up to that of the whole, and the output has its ``terms``. If None,
                those of this batch.
            head_noise: ``[N, R, noise_size]`` for the R unmasked predicted chunks or
                ``[N, B, S, noise_size]``, U[-1/2, 1/2). If None, config.num_samples are drawn for
                each chunk.
            target_noise: ``[M, R, L]``, N(0, 1); the targets are then sampled. If None,
                config.targets decides.
            seed: of draws that are not given, see `calm_kernels.noise.as_seed`.
            first_row: index of the first sequence within the global batch; a batch split over
                processes or accumulation steps then draws what the whole batch would.
            progress: share of the training that is done, 0 to 1; ``token_score_start`` of the
                configuration is compared with it.

        For K < 4 an n-gram spans chunks and needs a rollout: evaluation gives the loss alone, and
        `calm.evaluation.brier_scores` the scores.
        """
        draws = {"head_noise": head_noise, "target_noise": target_noise}
        return self._forward(input_ids, labels, loss_counts, seed, first_row, None, draws, progress)


class _DenoisingTransformer(ContinuousTransformer):
    """Language model whose head goes from noise to the latent in several steps."""

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        loss_counts: Tensor | None = None,
        head_noise: Tensor | None = None,
        target_noise: Tensor | None = None,
        timesteps: Tensor | None = None,
        sample_noise: Tensor | None = None,
        seed: Seed = None,
        first_row: int | Tensor = 0,
    ) -> CALMOutput:
        """Denoising loss of the next latents; in evaluation and for K >= 4 also Brier-1 to Brier-4.

        As `EnergyTransformer.forward`, except for the draws.

        Args:
            input_ids: ``[B, P*K]`` int64.
            labels: likewise, or None for hidden states alone.
            loss_counts: likewise.
            head_noise: ``[N*R, L]``, N(0, 1), sample-major: the DDPM noise, or the flow's start.
            target_noise: ``[N, R, L]``, N(0, 1).
            timesteps: ``[N*R]``: integer steps (diffusion) or times in [0, 1) (flow).
            sample_noise: of the two draws that are scored, N(0, 1): ``[2*B*S, L]`` (flow) or
                ``[101, 2*B*S, L]`` (diffusion).
            seed: of draws that are not given.
            first_row: index of the first sequence within the global batch.
        """
        draws = {"head_noise": head_noise, "target_noise": target_noise, "timesteps": timesteps}
        return self._forward(input_ids, labels, loss_counts, seed, first_row, sample_noise, draws)


class DiffusionTransformer(_DenoisingTransformer):
    """Language model with a diffusion head: 1000 steps in training, 100 to sample (section 7.4)."""

    head_type = "diffusion"

    def _build_head(self, config: CALMConfig) -> None:
        self.generative_head = DiffusionHead(config)


class FlowTransformer(_DenoisingTransformer):
    """Language model with a flow-matching head: 10 midpoint steps (section 7.4)."""

    head_type = "flow"

    def _build_head(self, config: CALMConfig) -> None:
        self.generative_head = FlowHead(config)


MODEL_CLASSES: dict[str, type[ContinuousTransformer]] = {
    model_class.head_type: model_class
    for model_class in (EnergyTransformer, DiffusionTransformer, FlowTransformer)
}
