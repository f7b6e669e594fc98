"""What the diffusion and the flow head share: draws in training and sampling, means over draws."""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from calm.configuration import CALMConfig
from calm.models.heads.base import HeadLoss, Posterior, expand_rows, noise_factor
from calm.models.heads.denoiser import Denoiser
from calm_kernels.noise import Seed, Stream, as_seed
from calm_kernels.uniform_draws import normal_draws, uniform_draws

__all__ = ["DenoisingHead"]

# Path draw d of step s is draw s * MAX_SAMPLES + d of its stream, so that it does not depend on how
# many are asked for.
MAX_SAMPLES = 1 << 16


class DenoisingHead(nn.Module):
    """A head that reaches a latent in several steps from normal noise.

    A subclass says how times are drawn, what a row of the loss is and how a path is walked.
    """

    entry_points: ClassVar[tuple[str, ...]] = ("sample", "loss")

    def __init__(self, config: CALMConfig, out_channels: int) -> None:
        super().__init__()
        self.config = config
        self.net = Denoiser(
            config.hidden_size,
            config.latent_size,
            out_channels,
            config.num_mlp_layers,
            config.head_init,
            recompute=config.head_recompute,
        )

    @property
    def num_evaluations(self) -> int:
        """Evaluations of the network, to draw a latent."""
        raise NotImplementedError

    @property
    def num_path_draws(self) -> int:
        """Normal draws that sampling takes after its start."""
        return 0

    def initialize(self, module: nn.Module) -> None:
        """See `Denoiser.initialize`."""
        self.net.initialize(module)

    def _times(self, fraction: Tensor) -> Tensor:
        """Training times from uniform draws in [0, 1)."""
        raise NotImplementedError

    def _row_loss(self, latent: Tensor, time: Tensor, noise: Tensor, condition: Tensor) -> Tensor:
        """Loss of each row, ``[N, B, S]``; the condition is `Denoiser.cond_embed` of ``h``."""
        raise NotImplementedError

    def _walk(self, condition: Tensor, draw: Callable[[int], Tensor]) -> Tensor:
        """Latents; ``draw(0)`` is the start, ``draw(i)`` the noise of step i."""
        raise NotImplementedError

    def loss(
        self,
        hidden: Tensor,
        posterior: Posterior,
        *,
        head_noise: Tensor | None = None,
        target_noise: Tensor | None = None,
        timesteps: Tensor | None = None,
        seed: Seed = None,
        first_row: int | Tensor = 0,
    ) -> HeadLoss:
        """Denoising loss of each chunk that counts, averaged over N draws of it.

        N is that of a given draw, else num_samples. Each draw is given for the R unmasked chunks
        or for all B*S.

        Args:
            hidden: ``[B, S, H]``.
            posterior: distribution of the latents; no gradient reaches it.
            head_noise: ``[N*R, L]``, N(0, 1), sample-major: the DDPM noise, or the flow's start.
            target_noise: ``[N, R, L]``, N(0, 1); targets are
                ``mean + exp(log_std) * target_noise``.
            timesteps: ``[N*R]``, integer steps (diffusion) or times in [0, 1) (flow).
            seed: of draws that are not given.
            first_row: global index of the first chunk.
        """
        weight, seed = posterior.weight, as_seed(seed, hidden.device)
        num_draws = self._num_draws(weight, target_noise, head_noise, timesteps)

        def rows(name: str, given: Tensor | None, stream: Stream) -> Tensor:
            """The draw that is given, or a fresh one, ``[N, B, S, width]``."""
            is_time = stream is Stream.TIMESTEP
            width = 1 if is_time else self.config.latent_size
            if given is not None:
                return expand_rows(name, given, weight, num_draws, width)
            random = uniform_draws if is_time else normal_draws
            drawn = random(
                weight.numel(),
                width,
                stream=stream,
                seed=seed,
                num_draws=num_draws,
                first_row=first_row,
                device=hidden.device,
            ).reshape(num_draws, *weight.shape, width)
            return self._times(drawn) if is_time else drawn

        epsilon = rows("target_noise", target_noise, Stream.TARGETS)
        time = rows("timesteps", timesteps, Stream.TIMESTEP)[..., 0]
        noise = rows("head_noise", head_noise, Stream.HEAD)
        latent = posterior.mean + posterior.log_std.exp() * epsilon
        loss = self._row_loss(latent, time, noise, self.net.cond_embed(hidden))
        return HeadLoss(loss=loss.mean(0) * weight)

    def _num_draws(
        self,
        weight: Tensor,
        target_noise: Tensor | None,
        head_noise: Tensor | None,
        timesteps: Tensor | None,
    ) -> int:
        """N of the draws that are given, else num_samples."""
        if target_noise is not None:
            return len(target_noise)
        given = head_noise if head_noise is not None else timesteps
        if given is None:
            return self.config.num_samples
        unmasked = int(weight.sum())
        return max(len(given) // max(unmasked, 1), 1)

    @torch.no_grad()
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
    ) -> Tensor:
        """Draw latents; not differentiable.

        Args:
            hidden: ``[..., H]``.
            noise: draws to use instead of fresh ones, N(0, 1), sample-major: the start ``[rows,
                L]`` (flow) or start and one draw a step ``[1 + steps, rows, L]`` (diffusion), with
                rows = num_samples * rows of `hidden`.
            num_samples: N draws a row; None for one, without the leading axis.
            seed: of fresh draws, see `noise.as_seed`; row r of `hidden` is row ``first_row + r``.
            first_row: global index of the first row.
            noise_scale: factor on every draw, >= 0; 0 is deterministic.
            noise_spread: another one, as nothing here normalises the noise.

        Returns: ``[..., L]``, or ``[num_samples, ..., L]``.
        """
        scale = noise_factor(noise_scale, noise_spread)
        if num_samples is not None and not 1 <= num_samples <= MAX_SAMPLES:
            raise ValueError(f"num_samples must lie in [1, {MAX_SAMPLES}], got {num_samples}")
        draws = () if num_samples is None else (num_samples,)
        shape = (*draws, *hidden.shape[:-1], self.config.latent_size)
        given = None if noise is None else self._check_noise(noise, shape)
        address = as_seed(seed, hidden.device) if noise is None else None

        def draw(step: int) -> Tensor:
            if given is not None:
                return given[step] * scale
            drawn = normal_draws(
                hidden.shape[:-1].numel(),
                shape[-1],
                stream=Stream.PATH if step else Stream.HEAD,
                seed=address,
                num_draws=num_samples,
                first_row=first_row,
                first_draw=step * MAX_SAMPLES,
                device=hidden.device,
            )
            return drawn.reshape(shape) * scale

        return self._walk(self.net.cond_embed(hidden), draw)

    def _check_noise(self, noise: Tensor, shape: tuple[int, ...]) -> Tensor:
        """`noise` as ``[1 + num_path_draws, *shape]``."""
        num_draws = 1 + self.num_path_draws
        if noise.numel() != num_draws * math.prod(shape) or noise.shape[-1] != shape[-1]:
            leading = (num_draws,) if num_draws > 1 else ()
            expected = (*leading, math.prod(shape[:-1]), shape[-1])
            raise ValueError(f"noise must have shape {expected}, got {tuple(noise.shape)}")
        return noise.reshape(num_draws, *shape).float()
