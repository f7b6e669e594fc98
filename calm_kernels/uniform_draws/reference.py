"""The formula, one call of Philox at a time, on Python's integers."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["draws_reference"]

MASK = 2**32 - 1


def draws_reference(
    seed: Tensor,  # [2] or [R, 2]
    num_rows: int,
    width: int,
    num_draws: int,
    first_row: int | Tensor,
    first_draw: int,
    stream: int,
    is_normal: bool,
) -> Tensor:
    """Draws ``[N, R, W]`` in float64; this reads the seed on the host."""
    seeds = seed.tolist() if seed.dim() == 2 else [seed.tolist()] * num_rows
    per_word = 2 if is_normal else 1
    words = math.ceil(width / (4 * per_word))
    values = []
    for index, (value, offset) in enumerate(seeds):
        key = (value & MASK, (value >> 32 & MASK) ^ stream)
        row = (int(first_row) + (index if seed.dim() == 1 else 0)) & MASK
        for draw in range(first_draw, first_draw + num_draws):
            counters = [
                (draw * words + word & MASK, row, offset & MASK, offset >> 32 & MASK)
                for word in range(words)
            ]
            calls = [list(_numbers(_philox(counter, key), is_normal)) for counter in counters]
            # Number k of all calls, then number k + 1: element e is number e // words.
            values.append([call[k] for k in range(4 * per_word) for call in calls][:width])
    found = torch.tensor(values, dtype=torch.float64, device=seed.device)
    return found.view(num_rows, num_draws, width).transpose(0, 1)


def _philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Ten rounds: two products of 64 bits, whose upper halves meet the key."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = second >> 32 ^ c1 ^ k0, second & MASK, first >> 32 ^ c3 ^ k1, first & MASK
        k0, k1 = k0 + 0x9E3779B9 & MASK, k1 + 0xBB67AE85 & MASK
    return c0, c1, c2, c3


def _numbers(words: tuple[int, ...], is_normal: bool) -> Iterator[float]:
    for word in words:
        if not is_normal:
            yield (word >> 8) / 2**24
            continue
        radius = math.sqrt(-2 * math.log(((word >> 12) + 0.5) / 2**20))
        angle = ((word & 4095) + 0.5) * 2 * math.pi / 4096 - math.pi
        yield radius * math.cos(angle)
        yield radius * math.sin(angle)
