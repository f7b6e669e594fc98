"""Decoding as the paper and the published code describe it, on our reference backend.

The baseline of `make bench` (`benchmarks.published` runs the published code itself). Every
candidate has a row of its own in head and decoder, all logits are computed, and a counter for each
sequence on the CPU chooses. Temperatures are 1/n only.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from calm.models.autoencoder import Decoder
from calm.models.continuous import ContinuousTransformer
from calm_kernels import use_backend
from calm_kernels.noise import Stream, uniform

__all__ = [
    "chunk_noise",
    "eligible_chunks",
    "reference_candidates",
    "reference_generate",
    "reference_tokens",
    "reference_vote",
]

Chunk = tuple[int, ...]
Noise = Callable[[int, int], Tensor]  # (chunk's index, draws) -> noise [draws, B, Z]


@torch.no_grad()
def reference_generate(
    model: ContinuousTransformer,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    num_samples: int = 200,
    noise: Noise | None = None,
    seed: int = 0,
) -> Tensor:
    """Prompts of whole chunks ``[B, T]`` continued by Algorithm 2, one chunk at a time.

    Args:
        model: a CALM with the energy head, of `benchmarks.models.as_published`.
        input_ids: int64, T a multiple of K.
        max_new_tokens: a multiple of K.
        temperature: 1/n.
        num_samples: N, candidates a chunk; one at temperature 1.
        noise: of the head, to repeat draws; fresh U[-1/2, 1/2) if None.
        seed: of the vote.
    """
    rng = random.Random(seed)
    num_agreeing = round(1 / temperature)
    count = 1 if num_agreeing == 1 else num_samples
    cache = DynamicCache(config=model.transformer.config)
    parts = [input_ids]
    with use_backend("reference"):
        for index in range(max_new_tokens // model.patch_size):
            hidden = model.transformer(
                inputs_embeds=model.embed_patches(parts[-1]), past_key_values=cache, use_cache=True
            ).last_hidden_state[:, -1]
            drawn = noise(index, count) if noise else _fresh_noise(model, hidden, count)
            candidates = reference_candidates(model, hidden, drawn)  # [N, B, K]
            rows = candidates.transpose(0, 1).tolist()
            voted = [reference_vote([tuple(row) for row in few], num_agreeing, rng) for few in rows]
            parts.append(torch.tensor(voted, device=input_ids.device))
    return torch.cat(parts, dim=1)


def reference_candidates(model: ContinuousTransformer, hidden: Tensor, noise: Tensor) -> Tensor:
    """Chunks ``[N, B, K]`` for states ``[B, H]`` repeated N times and noise ``[N, B, Z]``."""
    repeated = hidden.expand(*noise.shape[:2], -1).flatten(0, 1)  # [N*B, H]
    latents = model.generative_head.sample(repeated, noise.flatten(0, 1))  # [N*B, L]
    return reference_tokens(model.ae_model.decoder, latents).unflatten(0, noise.shape[:2])


def reference_tokens(decoder: Decoder, latents: Tensor) -> Tensor:
    """Latents ``[R, L]`` to tokens ``[R, K]``, all logits at once."""
    return F.linear(decoder.decode(latents), decoder.output_weight).argmax(-1)


def reference_vote(candidates: Sequence[Chunk], num_agreeing: int, rng: random.Random) -> Chunk:
    """Algorithm 2 for one sequence."""
    counts, level = eligible_chunks(candidates, num_agreeing)
    weights = [math.comb(count, level) for count in counts.values()]
    return rng.choices(list(counts), weights)[0]


def eligible_chunks(candidates: Sequence[Chunk], num_agreeing: int) -> tuple[dict[Chunk, int], int]:
    """Chunks that occur m times or more, with their counts, for the largest m <= n; and m."""
    counts = Counter(candidates)
    level = min(num_agreeing, max(counts.values()))
    return {chunk: count for chunk, count in counts.items() if count >= level}, level


def _fresh_noise(model: ContinuousTransformer, hidden: Tensor, count: int) -> Tensor:
    shape = (count, len(hidden), model.config.noise_size)
    return torch.rand(shape, device=hidden.device, dtype=hidden.dtype) - 0.5


def chunk_noise(seed: int, index: int, draws: int, noise_size: int) -> Tensor:
    """The head's noise ``[draws, 1, noise_size]`` that `calm.decoding.generate` draws for chunk
    `index` of a sequence with this seed.
    """
    address = torch.tensor([[seed, index]])
    drawn = uniform(1, noise_size, stream=Stream.HEAD, seed=address, num_draws=draws)
    return drawn - 0.5
