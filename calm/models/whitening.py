"""Another basis for a trained latent, in which latents of the text have unit variance.

Nothing is added to the model: the change is folded into the linear layers around the latent.

A posterior N(μ, diag σ²) of independent dimensions stays one under a scaling of its dimensions, and
under no other change of basis unless σ is equal in all of them. Hence two kinds. With the means c
and C = Cov(μ) and S = diag(E σ²) over chunks of the text, latents have the covariance C + S.

    diagonal:  μ' = (μ - c) / s,   σ' = σ / s,   s² = diag(C + S)
               Exact: the same model in other units. Unit variances; correlations stay.
    full:      μ' = A (μ - c),   A = (Λ + 1)^(-1/2) Uᵀ S^(-1/2),   S^(-1/2) C S^(-1/2) = U Λ Uᵀ
               σ'² = 1 / (Λ + 1), the same for every chunk
               Exact for means, and A (C + S) Aᵀ = I. A S Aᵀ = diag σ'² is the noise of the average
               chunk; that of a single chunk would not be diagonal and is given up for it.

The decoder reads z through the inverse, so that it gives the same logits for the same point.

Shapes: B batch, P chunks, L latent size.
"""

from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from calm.models.autoencoder import Autoencoder

__all__ = ["LatentMoments", "whiten"]


class LatentMoments(NamedTuple):
    """Sums over chunks, float64; those of several batches add up.

    Attributes:
        chunks: how many, ``[]``.
        mean: Σ μ, ``[L]``.
        products: Σ μ μᵀ, ``[L, L]``.
        variance: Σ σ², ``[L]``.
    """

    chunks: Tensor
    mean: Tensor
    products: Tensor
    variance: Tensor

    @classmethod
    def of(cls, latent_states: Tensor, is_counted: Tensor) -> Self:
        """Of mean and log std side by side, ``[B, P, 2L]``, where ``[B, P]`` says so."""
        mean, log_std = latent_states[is_counted].double().chunk(2, dim=-1)
        variance = (2 * log_std).exp().sum(0)
        return cls(is_counted.sum().double(), mean.sum(0), mean.T @ mean, variance)

    def plus(self, other: Self) -> Self:
        """Of both."""
        return type(self)(*(a + b for a, b in zip(self, other, strict=True)))


class _Basis(NamedTuple):
    """z' = A (z - c), and the standard deviation in it where it is one for all chunks."""

    matrix: Tensor  # A, [L, L]
    inverse: Tensor  # [L, L]
    centre: Tensor  # c, [L]
    std: Tensor | None  # [L]


def whiten(model: Autoencoder, moments: LatentMoments, kind: Literal["diagonal", "full"]) -> None:
    """Change the basis of the latent of `model`, in place; computed in float64, rounded once.

    Args:
        model: whose encoder gave the moments; not with ``latent_sphere``.
        moments: of the text.
        kind: see above.

    Raises:
        ValueError: fewer than two chunks.
    """
    if moments.chunks < 2:
        raise ValueError(f"moments must be of at least 2 chunks, got {int(moments.chunks)}")
    basis = _diagonal(moments) if kind == "diagonal" else _full(moments)
    _fold(model, basis)


def _central(moments: LatentMoments) -> tuple[Tensor, Tensor, Tensor]:
    """c, C and the diagonal of S."""
    centre = moments.mean / moments.chunks
    covariance = moments.products / moments.chunks - torch.outer(centre, centre)
    return centre, covariance, moments.variance / moments.chunks


def _diagonal(moments: LatentMoments) -> _Basis:
    centre, covariance, noise = _central(moments)
    scale = (covariance.diagonal().clamp(min=0) + noise).sqrt()
    return _Basis(torch.diag(1 / scale), torch.diag(scale), centre, None)


def _full(moments: LatentMoments) -> _Basis:
    centre, covariance, noise = _central(moments)
    scale = noise.sqrt()
    values, vectors = torch.linalg.eigh(covariance / torch.outer(scale, scale))
    std = (values.clamp(min=0) + 1).rsqrt()
    matrix = std[:, None] * vectors.T / scale
    inverse = scale[:, None] * vectors / std
    return _Basis(matrix, inverse, centre, std)


@torch.no_grad()
def _fold(model: Autoencoder, basis: _Basis) -> None:
    encoding: Any = model.encoder.hidden_to_latent
    decoding: Any = model.decoder.latent_to_hidden
    of_mean, of_log_std = encoding.weight.double().chunk(2)
    mean_bias, log_std_bias = encoding.bias.double().chunk(2)
    if basis.std is None:
        log_std_bias = log_std_bias + basis.matrix.diagonal().log()
    else:
        of_log_std, log_std_bias = torch.zeros_like(of_log_std), basis.std.log()
    mean_bias = basis.matrix @ (mean_bias - basis.centre)
    decoding.bias.copy_(decoding.bias.double() + decoding.weight.double() @ basis.centre)
    decoding.weight.copy_(decoding.weight.double() @ basis.inverse)
    encoding.weight.copy_(torch.cat([basis.matrix @ of_mean, of_log_std]))
    encoding.bias.copy_(torch.cat([mean_bias, log_std_bias]))
