"""The interface of a language model's head."""

import math
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

__all__ = [
    "GenerativeHead", "HeadLoss", "Posterior", "expand_rows", "is_recomputed", "noise_factor",
]  # fmt: skip


class Posterior(NamedTuple):
    """Gaussian distribution of the latents to predict, and which of them count.

    Attributes:
        mean: ``[B, S, L]``.
        log_std: ``[B, S, L]``.
        weight: ``[B, S]``, 1 for a chunk that counts, 0 for a masked one.
    """

    mean: Tensor
    log_std: Tensor
    weight: Tensor


class HeadLoss(NamedTuple):
    """Loss of each chunk, 0 for a masked one, and what else the energy head knows.

    Attributes:
        loss: ``[B, S]``.
        fidelity: likewise; energy head.
        diversity: likewise; energy head.
        samples: its draws, ``[N, B, S, L]``; energy head.
        measured: of a `calm.models.objective.Objective`: what it has logged beside the loss, each
            ``[B, S]``, 0 for a masked chunk.
    """

    loss: Tensor
    fidelity: Tensor | None = None
    diversity: Tensor | None = None
    samples: Tensor | None = None
    measured: Mapping[str, Tensor] = {}


class GenerativeHead(Protocol):
    """A head: draws latents, and has the loss that trains it.

    Attributes:
        entry_points: methods beside `forward` through which others reach its weights. Where weights
            are sharded, each gathers them.
    """

    entry_points: ClassVar[tuple[str, ...]]

    @property
    def loss(self) -> Callable[..., HeadLoss]:
        """Of hidden states ``[B, S, H]`` and a `Posterior`; its keywords are the head's draws."""
        ...

    def sample(
        self,
        hidden: Tensor,
        noise: Tensor | None = None,
        num_samples: int | None = None,
        seed: int | Tensor | None = None,
        first_row: int | Tensor = 0,
        noise_scale: float = 1.0,
        *,
        noise_spread: float = 1.0,
    ) -> Tensor:
        """Latents ``[..., L]`` for hidden states ``[..., H]``, or ``[num_samples, ..., L]``.

        `noise_scale` multiplies the noise itself. `noise_spread` multiplies the noise after the
        head has normalised it; in a head without such a norm both are the same factor. Both are
        >= 0, and 0 is deterministic.
        """
        ...

    def initialize(self, module: nn.Module) -> None:
        """Give `module`, if it belongs to the head, its initial weights."""
        ...


def is_recomputed(module: nn.Module, is_asked: bool) -> bool:
    """Whether a head computes its blocks again for the backward pass: in training alone.

    Args:
        module: of the head, with the attribute ``gradient_checkpointing``, which transformers sets.
        is_asked: `head_recompute` of its configuration.
    """
    return module.training and (is_asked or bool(module.gradient_checkpointing))


def expand_rows(name: str, draw: Tensor, weight: Tensor, num_draws: int, width: int) -> Tensor:
    """A draw for the unmasked chunks, or for all, as one for all chunks: masked ones get zeros.

    Args:
        name: of the argument, for the error.
        draw: ``[..., width]`` (``[...]`` for width 1); in row-major order num_draws draws of the
            unmasked chunks, or of all.
        weight: ``[B, S]``, 0 for a masked chunk.
        num_draws: N.
        width: elements a row.

    Returns: ``[N, B, S, width]``. A draw for all chunks does not synchronise.
    """
    total = weight.numel()
    is_row = width == 1 or draw.shape[-1:] == (width,)
    if is_row and draw.numel() == num_draws * total * width:
        return draw.reshape(num_draws, *weight.shape, width)
    is_unmasked = weight.bool()
    unmasked = int(is_unmasked.sum())
    if not is_row or draw.numel() != num_draws * unmasked * width:
        raise ValueError(
            f"{name} must hold {num_draws} draws of {unmasked} rows (unmasked chunks) or {total} "
            f"(all chunks), {width} wide; got shape {tuple(draw.shape)}"
        )
    expanded = draw.new_zeros(num_draws, *weight.shape, width)
    expanded[:, is_unmasked] = draw.reshape(num_draws, unmasked, width)
    return expanded


def noise_factor(noise_scale: float, noise_spread: float) -> float:
    """Their product, for a head in which both are one factor on normal noise.

    Raises:
        ValueError: one is negative or not finite.
    """
    for name, factor in (("noise_scale", noise_scale), ("noise_spread", noise_spread)):
        if not (factor >= 0.0 and math.isfinite(factor)):
            raise ValueError(f"{name} must be finite and at least 0, got {factor}")
    return noise_scale * noise_spread
