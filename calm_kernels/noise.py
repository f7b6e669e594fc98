"""Counter-based random numbers: Philox 4x32-10, the same bits whatever the device or batch split.

A draw is addressed, not consumed. Its key is (seed, stream) and its counter names what it is for:

    key     = (seed low word, seed high word xor stream)
    counter = (draw * words_per_row + word, global row, offset low word, offset high word)

so ranks and accumulation steps that share a seed draw different rows of one table, and a resumed
run continues it. One Philox call gives four 32-bit words; a word gives one uniform (24 bits) or
two normals (20 bits of radius, 12 bits of angle). Element ``e`` of a row of width ``W`` is found at
word ``q = e % words`` with ``words = ceil(W/4)`` for uniforms (``words = ceil(W/8)`` for normals),
output ``e // words``: the layout in which a kernel writes slices.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import math
from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from calm_kernels.checks import check_integer

__all__ = ["Seed", "Stream", "as_seed", "normal", "philox", "uniform"]

Seed = int | Tensor | None

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_KEY_OFFSETS = tuple(tuple(step * size for size in _KEY_STEPS) for step in range(_ROUNDS))
_RADIUS_BITS, _ANGLE_BITS = 20, 12
_FEW = 8192  # words up to which a call costs by its number of operations
_AHEAD, _FEW_AHEAD = 16, 2048  # offsets whose words are made together, and words of all of them


class Stream(IntEnum):
    """What a draw is for; streams of one seed are independent."""

    TARGETS = 1
    HEAD = 2
    LATENT = 3
    LATENT_KEEP = 4
    TOKEN_KEEP = 5
    VOTE = 6
    TIMESTEP = 7
    PATH = 8
    FACTORY = 9
    SEQUENCE = 10


def as_seed(seed: Seed, device: torch.device | str) -> Tensor:
    """`seed` as an int64 tensor of (seed, offset), ``[2]``, or ``[rows, 2]`` for one stream a row.

    Args:
        seed: an int (offset 0); a tensor ``[2]`` of (seed, offset); one seed a row as
            ``[rows, 2]``, ``[rows, 1]`` or ``[rows]`` (a one-dimensional tensor of two entries is
            (seed, offset)); None draws one from torch's default generator, so that
            ``torch.manual_seed`` governs it.
        device: where the draws are made.
    """
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()).item())
    if isinstance(seed, int) and not isinstance(seed, bool):
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed must fit into 64 bits, got {seed}")
        return torch.tensor([seed, 0], dtype=torch.int64, device=device)
    if not isinstance(seed, Tensor):
        raise TypeError(f"seed must be an int, an int64 tensor or None, got {type(seed).__name__}")
    if seed.dtype != torch.int64:
        raise TypeError(f"seed must have dtype int64, got {seed.dtype}")
    if seed.dim() == 1 and seed.shape[0] != 2:
        seed = seed[:, None]
    if seed.dim() == 2 and seed.shape[1] == 1:
        seed = torch.cat([seed, torch.zeros_like(seed)], dim=1)
    if seed.shape[-1:] != (2,) or seed.dim() > 2:
        raise ValueError(f"seed must have shape [2], [rows] or [rows, 2], got {tuple(seed.shape)}")
    return seed.to(device)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Philox 4x32-10: four 32-bit words (in int64) for each counter; arguments broadcast.

    A 32 x 32 bit product wraps in int64, which leaves its 64 bits right. Its upper half, the next
    counter after two exclusive ors, is masked there; its lower half only ever enters such an or, so
    it may keep its upper bits until the end.
    """
    if counter[0].device.type == "cpu":  # constants would have to be copied to a GPU
        words = torch.broadcast_tensors(*counter, *key)[:4]
        if _is_few(words[0]):
            return _philox_in_pairs(words, key)
    return _philox_word_by_word(counter, key)


def _is_few(words: Tensor) -> bool:
    """Whether operations cost by their number; a compiler joins them itself."""
    return not torch.compiler.is_compiling() and words.numel() <= _FEW


def _philox_word_by_word(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """`philox` without temporaries that do not fit into a cache."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for step in range(_ROUNDS):
        if step:
            k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((product1 >> 32) ^ c1 ^ k0) & _MASK
        c2 = ((product0 >> 32) ^ c3 ^ k1) & _MASK
        c1, c3 = product1, product0
    return c0, c1 & _MASK, c2, c3 & _MASK


def _philox_in_pairs(counter: Sequence[Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """`philox` with half of the operations, whose number is what few draws on a CPU cost.

    (c0, c2) are one tensor and (c3, c1) another; the keys of all rounds are made at once.
    """
    c0, c1, c2, c3 = counter
    ones = [1] * c0.dim()
    factors = torch.tensor(_MULTIPLIERS, device=c0.device).view(2, *ones)
    offsets = torch.tensor(_KEY_OFFSETS, device=c0.device).view(_ROUNDS, 2, *ones)
    pair = torch.stack(torch.broadcast_tensors(*key))
    pair = pair.view(2, *ones[pair.dim() - 1 :], *pair.shape[1:])
    even, crossed = torch.stack([c0, c2]), torch.stack([c3, c1])
    for round_key in ((pair + offsets) & _MASK).unbind():
        product = even * factors
        even = (product >> 32).bitwise_xor_(crossed).flip(0)
        even.bitwise_xor_(round_key).bitwise_and_(_MASK)
        crossed = product
    crossed = crossed & _MASK
    return even[0], crossed[1], even[1], crossed[0]


class _Draws(NamedTuple):
    """What is drawn for each row."""

    words: int
    num_draws: int
    stream: Stream
    first_row: int | Tensor
    first_draw: int


def _words(num_rows: int, seed: Tensor, of: _Draws) -> tuple[Tensor, ...]:
    """Four word tensors ``[num_rows, num_draws, words]``."""
    if seed.dim() == 2 and seed.shape[0] != num_rows:
        raise ValueError(f"seed has {seed.shape[0]} rows for {num_rows} rows of noise")
    is_small = 0 < _AHEAD * num_rows * of.num_draws * of.words <= _FEW_AHEAD
    is_address = seed.dim() == 2 and isinstance(of.first_row, int)
    if not (is_small and is_address and seed.device.type == "cpu" and _is_plain(seed)):
        return _fresh_words(num_rows, seed, of)
    rows = seed.tolist()
    offset = rows[0][1]
    step = offset % _AHEAD
    apart = tuple((value, _wrapped(other - offset)) for value, other in rows)
    return tuple(word[step] for word in _words_ahead(apart, offset - step, of))


def _is_plain(seed: Tensor) -> bool:
    """Whether the values of `seed` are there to be read, and reading them leaves no trace."""
    return (
        type(seed) is Tensor
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
    )


@lru_cache(maxsize=32)
def _words_ahead(apart: tuple[tuple[int, int], ...], offset: int, of: _Draws) -> tuple[Tensor, ...]:
    """`_words` of `_AHEAD` offsets from `offset` on, ``[_AHEAD, num_rows, num_draws, words]`` each.

    Generation advances the offset by one a chunk, and few words cost nearly as much as all of
    these. `apart` holds seed and distance to `offset` of each row.
    """
    seed = torch.tensor(apart, dtype=torch.int64, device="cpu").repeat(_AHEAD, 1)
    seed[:, 1] += offset + torch.arange(_AHEAD, device="cpu").repeat_interleave(len(apart))
    drawn = _fresh_words(len(seed), seed, of)
    return tuple(word.unflatten(0, (_AHEAD, -1)) for word in drawn)


def _wrapped(value: int) -> int:
    """`value` as int64 holds it."""
    return (value + 2**63) % 2**64 - 2**63


def _fresh_words(num_rows: int, seed: Tensor, of: _Draws) -> tuple[Tensor, ...]:
    """`_words`, made now."""
    device = seed.device
    value, offset = seed[..., 0], seed[..., 1]
    column = (slice(None), None, None) if seed.dim() == 2 else (None, None, None)
    value, offset = value[column], offset[column]
    key = (value & _MASK, ((value >> 32) & _MASK) ^ int(of.stream))
    row = torch.arange(num_rows, device=device)[:, None, None]
    row = torch.zeros_like(row) + of.first_row if seed.dim() == 2 else row + of.first_row
    draw = torch.arange(of.num_draws, device=device)[:, None] + of.first_draw
    element = (draw * of.words + torch.arange(of.words, device=device))[None]
    row, low, high = row & _MASK, offset & _MASK, (offset >> 32) & _MASK
    return philox((element & _MASK, row, low, high), key)


def _to_shape(
    outputs: list[Tensor], width: int, num_draws: int | None, dtype: torch.dtype
) -> Tensor:
    """Join slices ``[rows, draws, words]`` to ``[draws, rows, width]`` or ``[rows, width]``."""
    values = torch.cat(outputs, dim=-1)[..., :width].to(dtype)
    return values[:, 0] if num_draws is None else values.transpose(0, 1)


def _check(num_rows: int, width: int, num_draws: int | None, first_draw: int) -> None:
    check_integer("num_rows", num_rows, 0)
    check_integer("width", width, 1)
    check_integer("first_draw", first_draw, 0)
    if num_draws is not None:
        check_integer("num_draws", num_draws, 0)


def uniform(
    num_rows: int,
    width: int,
    *,
    stream: Stream,
    seed: Seed = None,
    num_draws: int | None = None,
    first_row: int | Tensor = 0,
    first_draw: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform draws in [0, 1), multiples of 2^-24 before they are rounded to `dtype`.

    Args:
        num_rows: R, rows of this call. Row ``r`` is row ``first_row + r`` of the stream; with a
            seed per row every row is row `first_row` of its own stream.
        width: elements a row.
        stream: what the draws are for.
        seed: see `as_seed`.
        num_draws: N draws a row; None for one, without the leading axis.
        first_row: index of the first row.
        first_draw: index of the first draw, to continue a sequence of draws.
        device: where the draws are made.
        dtype: of the result.

    Returns: ``[num_draws, num_rows, width]`` (a view of row-major memory) or ``[num_rows, width]``.
    """
    _check(num_rows, width, num_draws, first_draw)
    words = math.ceil(width / 4)
    count = 1 if num_draws is None else num_draws
    of = _Draws(words, count, stream, first_row, first_draw)
    drawn = _words(num_rows, as_seed(seed, device), of)
    parts = [torch.cat(drawn, dim=-1)] if _is_few(drawn[0]) else drawn
    return _to_shape(
        [(part >> 8).to(torch.float32) * 2.0**-24 for part in parts], width, num_draws, dtype
    )


def normal(
    num_rows: int,
    width: int,
    *,
    stream: Stream,
    seed: Seed = None,
    num_draws: int | None = None,
    first_row: int | Tensor = 0,
    first_draw: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal draws by Box-Muller, |draw| < 5.4; arguments and result as `uniform`.

    radius = sqrt(-2 ln((k + 1/2) / 2^20)), angle = 2 pi (j + 1/2) / 2^12 - pi, with k the upper 20
    and j the lower 12 bits of a word; word w of a call gives radius * cos(angle) to slice 2w and
    radius * sin(angle) to slice 2w + 1.
    """
    _check(num_rows, width, num_draws, first_draw)
    words = math.ceil(width / 8)
    count = 1 if num_draws is None else num_draws
    of = _Draws(words, count, stream, first_row, first_draw)
    drawn = _words(num_rows, as_seed(seed, device), of)
    slices = []
    for word in drawn:
        fraction = ((word >> _ANGLE_BITS).to(torch.float32) + 0.5) * 2.0**-_RADIUS_BITS
        radius = torch.sqrt(-2.0 * torch.log(fraction))
        step = 2.0 * math.pi / 2**_ANGLE_BITS
        angle = ((word & (2**_ANGLE_BITS - 1)).to(torch.float32) + 0.5) * step - math.pi
        slices += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return _to_shape(slices, width, num_draws, dtype)
