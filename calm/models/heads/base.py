"""What a language model asks of its head."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

__all__ = ["GenerativeHead", "HeadLoss", "Posterior", "expand_rows"]


class Posterior(NamedTuple):
    """Gaussian law of the latents to predict, and which of them count.

    Attributes:
        mean: ``[B, S, L]``.
        log_std: ``[B, S, L]``.
        weight: ``[B, S]``, 1 for a patch that counts, 0 for a masked one.
    """

    mean: Tensor
    log_std: Tensor
    weight: Tensor


class HeadLoss(NamedTuple):
    """Loss of a head, a scalar, with the energy head's two terms and its draws ``[N, B, S, L]``."""

    loss: Tensor
    fidelity: Tensor | None = None
    diversity: Tensor | None = None
    samples: Tensor | None = None


class GenerativeHead(Protocol):
    """A head. Besides the two methods here it has a ``loss`` with the draws of its own kind."""

    def sample(
        self,
        hidden: Tensor,
        noise: Tensor | None = None,
        num_samples: int | None = None,
        seed: int | Tensor | None = None,
        first_row: int | Tensor = 0,
        noise_scale: float = 1.0,
    ) -> Tensor:
        """Latents ``[..., L]`` for hidden states ``[..., H]``, or ``[num_samples, ..., L]``."""
        ...

    def initialize(self, module: nn.Module) -> None:
        """Give `module`, if it belongs to the head, its initial weights."""
        ...


def expand_rows(name: str, draw: Tensor, weight: Tensor, width: int) -> Tensor:
    """A draw given for the unmasked patches, or for all, as one for all: masked patches get zeros.

    Args:
        name: of the argument, for the error.
        draw: N draws a patch, ``[N, ..., width]``; patches in row-major order.
        weight: ``[B, S]``, 0 for a masked patch.
        width: elements a row.

    Returns: ``[N, B, S, width]``.
    """
    flat = draw.reshape(draw.shape[0], -1, width) if draw.shape[-1:] == (width,) else None
    num_rows = -1 if flat is None else flat.shape[1]
    if flat is not None and num_rows == weight.numel():
        return flat.reshape(-1, *weight.shape, width)
    is_unmasked = weight.bool()
    num_unmasked = int(is_unmasked.sum())
    if flat is None or num_rows != num_unmasked:
        raise ValueError(
            f"{name} must hold, for each of its draws, {num_unmasked} rows (unmasked patches) or "
            f"{weight.numel()} (all patches) of {width}; got shape {tuple(draw.shape)}"
        )
    expanded = torch.zeros(len(flat), *weight.shape, width, dtype=draw.dtype, device=draw.device)
    expanded[:, is_unmasked] = flat
    return expanded
