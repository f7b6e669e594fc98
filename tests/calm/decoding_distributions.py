"""A chunk distribution with known probabilities, and tests of frequencies against them."""

import math

import torch

from calm_kernels.noise import Stream, uniform


class ToyDistribution:
    """Each sequence draws chunk x with chance P(x); the latent is the chunk's number.

    Args:
        chances: P, one number for each chunk.
        batch: sequences, which all have the same distribution.
        chunks: tokens of each chunk, ``[X, K]``; by default the digits of its number, K = 2.
        damaged: sequences whose latents are not finite.
    """

    device = torch.device("cpu")

    def __init__(self, chances, batch, chunks=None, damaged=()):
        self.chances = torch.tensor(chances, dtype=torch.float64)
        number = torch.arange(len(chances))
        self.chunks = torch.stack([number // 2, number % 2], 1) if chunks is None else chunks
        self.patch_size = self.chunks.shape[1]
        self.damaged = torch.zeros(batch, dtype=torch.bool)
        self.damaged[list(damaged)] = True
        self.projected = 0

    def __len__(self):
        return len(self.damaged)

    def latents(self, num_samples, seed, *, noise_scale=1.0, noise_spread=1.0):
        value = uniform(
            len(self), 1, stream=Stream.HEAD, seed=seed, num_draws=num_samples, dtype=torch.float64
        )
        edges = self.chances.cumsum(0)[:-1].contiguous()
        value = (value * noise_scale * noise_spread).contiguous()
        drawn = torch.searchsorted(edges, value, right=True).to(torch.float32)
        return drawn.masked_fill(self.damaged[:, None], math.nan)

    def slots(self, latents):
        return self.chunks[latents.nan_to_num().long()[..., 0]][..., None].to(torch.float32)

    def project(self, slots):
        self.projected += slots[..., 0].numel()
        return slots[..., 0].long()

    def select(self, rows):
        chosen = ToyDistribution(self.chances.tolist(), len(rows), self.chunks)
        chosen.damaged = self.damaged[rows]
        return chosen

    def numbers(self, tokens):
        """Chunks ``[B, K]`` as their numbers ``[B]``."""
        return (tokens[:, None] == self.chunks).all(-1).to(torch.uint8).argmax(1)


def row_seeds(batch, first=0):
    """A seed for each sequence."""
    return torch.stack([torch.arange(batch) + first, torch.zeros(batch, dtype=torch.int64)], 1)


def sharpened(chances, power):
    """P(x)^power / Z."""
    raised = torch.tensor(chances, dtype=torch.float64) ** power
    return raised / raised.sum()


def check_frequencies(numbers, probabilities):
    """Pearson's chi-square of `numbers` under `probabilities` lies below its 99.99 % quantile."""
    counts = torch.bincount(numbers, minlength=len(probabilities)).double()
    assert len(counts) == len(probabilities), "a chunk that the distribution does not have"
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * len(numbers)
    statistic = ((counts[possible] - expected) ** 2 / expected).sum().item()
    freedom = int(possible.sum()) - 1
    # Wilson and Hilferty: (X/k)^(1/3) is normal with variance 2/(9k).
    spread = 2 / (9 * freedom)
    limit = freedom * (1 - spread + 3.719 * math.sqrt(spread)) ** 3
    assert statistic < limit, f"chi-square {statistic:.1f} with {freedom} degrees of freedom"
