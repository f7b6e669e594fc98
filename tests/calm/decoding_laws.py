"""Sources whose law is known, and the tests that frequencies are put to."""

import math

import torch

from calm_kernels.noise import Stream, uniform


class ToySource:
    """Each sequence draws patch x with chance P(x); the latent is the patch's number.

    Args:
        chances: P, one number a patch.
        batch: sequences, all of the same law.
        patches: tokens of each patch, ``[X, K]``; by default the digits of its number, K = 2.
        damaged: sequences whose latents are not finite.
    """

    device = torch.device("cpu")

    def __init__(self, chances, batch, patches=None, damaged=()):
        self.chances = torch.tensor(chances, dtype=torch.float64)
        number = torch.arange(len(chances))
        self.patches = torch.stack([number // 2, number % 2], 1) if patches is None else patches
        self.patch_size = self.patches.shape[1]
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
        return self.patches[latents.nan_to_num().long()[..., 0]][..., None].to(torch.float32)

    def project(self, slots):
        self.projected += slots[..., 0].numel()
        return slots[..., 0].long()

    def select(self, rows):
        chosen = ToySource(self.chances.tolist(), len(rows), self.patches)
        chosen.damaged = self.damaged[rows]
        return chosen

    def numbers(self, tokens):
        """Patches ``[B, K]`` as their numbers ``[B]``."""
        return (tokens[:, None] == self.patches).all(-1).to(torch.uint8).argmax(1)


def row_seeds(batch, first=0):
    """A seed for each sequence."""
    return torch.stack([torch.arange(batch) + first, torch.zeros(batch, dtype=torch.int64)], 1)


def sharpened(chances, power):
    """P(x)^power / Z."""
    raised = torch.tensor(chances, dtype=torch.float64) ** power
    return raised / raised.sum()


def check_frequencies(numbers, law):
    """Pearson's chi-square of `numbers` under `law` lies below its 99.99 % quantile."""
    counts = torch.bincount(numbers, minlength=len(law)).double()
    assert len(counts) == len(law), "a patch that the law does not have"
    possible = law > 0
    assert counts[~possible].sum() == 0
    expected = law[possible] * len(numbers)
    statistic = ((counts[possible] - expected) ** 2 / expected).sum().item()
    freedom = int(possible.sum()) - 1
    # Wilson and Hilferty: (X/k)^(1/3) is normal with variance 2/(9k).
    spread = 2 / (9 * freedom)
    limit = freedom * (1 - spread + 3.719 * math.sqrt(spread)) ** 3
    assert statistic < limit, f"chi-square {statistic:.1f} with {freedom} degrees of freedom"
