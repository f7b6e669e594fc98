"""A kernel score of tokens through the frozen decoder, a training term of the energy head.

The energy score compares latents. Here draws z_i, i < N, become distributions of tokens, p_ij =
softmax of the decoder's logits of slot j, and the first n tokens of a chunk are scored, n = 1..4:

    S_n = 2/N Σ_i Π_{j≤n} p_ij(x_j) - 1/(N(N-1)) Σ_{i≠i'} Π_{j≤n} Σ_v p_ij(v) p_i'j(v)

Its mean over draws is the Brier score 2 q(x) - Σ_y q(y)² of the distribution q = E_z Π_j p_zj.
Where x has distribution P, that is Σ P² - Σ (P - q)² in the mean: highest where q = P, so that the
score is proper, and strictly so among the distributions that the decoder can express.

Cost: N n V logits a chunk. Their matmuls run twice, not three times, as the decoder's weights get
no gradient: while it is on, 37 % more operations a step in the demo (V = 259), 78 % more in CALM-M
(V = 128256). Three arrays of logits are in memory at once, 4 MB each and chunk for 2 draws of 4
tokens from 128256. Chunks go through in pieces of `MAX_LOGITS` logits; with more than one, each is
computed again for its backward pass.

Source: kernel scores, Gneiting and Raftery 2007, section 5; the Brier score of drawn n-grams, CALM,
section 4.
"""

import operator
from collections.abc import Iterable
from functools import partial
from itertools import accumulate, combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from calm.labels import IGNORE_INDEX
from calm.models.agreement import MAX_ORDER
from calm.models.autoencoder import Decoder

__all__ = ["MAX_LOGITS", "mixture_scores", "token_scores"]

MAX_LOGITS = 1 << 26  # 268 MB in float32


def token_scores(
    decoder: Decoder, latents: Tensor, labels: Tensor, *, max_logits: int = MAX_LOGITS
) -> Tensor:
    """Mean over n of S_n for each chunk, higher is better.

    Args:
        decoder: frozen; gradients go through it, none to its weights.
        latents: draws ``[N, ..., L]``, N >= 2; differentiable.
        labels: tokens that followed, ``[..., K]``, -100 where they do not count. S_n of a chunk is
            0 unless its first n labels count.
        max_logits: chunks are cut into pieces of at most so many logits, of at least one chunk.

    Returns: ``[...]`` in float32 (float64 for a decoder in float64).
    """
    tokens = labels[..., :MAX_ORDER].flatten(0, -2)
    rows = latents.flatten(1, -2)
    of_chunk = len(rows) * tokens.shape[-1] * len(decoder.output_weight)
    size = max(1, max_logits // of_chunk)
    score: Any = partial(_decoded_scores, decoder)
    if len(tokens) > size:
        score = partial(checkpoint, score, use_reentrant=False, preserve_rng_state=False)
    pieces = zip(rows.split(size, dim=1), tokens.split(size), strict=True)
    return torch.cat([score(*piece) for piece in pieces]).reshape(labels.shape[:-1])


def _decoded_scores(decoder: Decoder, latents: Tensor, tokens: Tensor) -> Tensor:
    """`token_scores` of one piece: latents ``[N, R, L]``, tokens ``[R, n]``."""
    slots = decoder.finish(decoder.expand(latents)[..., : tokens.shape[-1], :])
    logits = F.linear(slots, decoder.output_weight)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scores = mixture_scores(logits.softmax(-1, dtype=dtype), tokens.clamp(min=0))
    is_counted = (tokens != IGNORE_INDEX).int().cumprod(-1)  # all labels up to here
    return (scores * is_counted).mean(-1)


def mixture_scores(probabilities: Tensor, tokens: Tensor) -> Tensor:
    """S_1, S_2, ... of a mixture over draws of products of distributions.

    Args:
        probabilities: p_ij, ``[N, R, n, V]``, N >= 2; differentiable.
        tokens: ``[R, n]`` int64 in [0, V).

    Returns: ``[R, n]``.
    """
    index = tokens.expand(len(probabilities), *tokens.shape)[..., None]
    chosen = probabilities.gather(-1, index)[..., 0].unbind(-1)
    hits = torch.stack([product.mean(0) for product in _products(chosen)], -1)
    pairs = combinations(probabilities, 2)
    overlaps = torch.stack([(one * other).sum(-1) for one, other in pairs]).unbind(-1)
    meetings = torch.stack([product.mean(0) for product in _products(overlaps)], -1)
    return 2 * hits - meetings


def _products(factors: Iterable[Tensor]) -> Iterable[Tensor]:
    """Running products. The gradient of `torch.cumprod` would synchronise a GPU."""
    return accumulate(factors, operator.mul)
