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
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from calm_kernels.checks import check_int64, check_integer
from calm_kernels.operators import is_traced

__all__ = [
    "Seed",
    "Stream",
    "as_first_row",
    "as_seed",
    "check_draws",
    "normal",
    "philox",
    "split_first_row",
    "uniform",
]

Seed = int | Tensor | None

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_RADIUS_BITS, _ANGLE_BITS = 20, 12


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
    DECODER_NOISE = 11
    TEACHER = 12


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
        return torch.tensor([check_int64("seed", seed), 0], dtype=torch.int64, device=device)
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


def as_first_row(first_row: int | Tensor, device: torch.device) -> Tensor:
    """`first_row` as an int64 tensor, as kernels read it; that of an integer is made once.

    Every micro-batch of a step has its own first row, the same in every step: its memory is filled
    the first time alone. Not inside a CUDA graph, which would outlive what is kept here, nor for
    torch.compile or a mode, whose tensors must not be kept.
    """
    if isinstance(first_row, Tensor):
        return first_row.to(device)
    is_cuda = device.type == "cuda"
    if is_traced() or (is_cuda and torch.cuda.is_current_stream_capturing()):
        return _filled(first_row, device)
    stream = torch.cuda.current_stream(device).cuda_stream if is_cuda else 0
    return _kept(first_row, device, stream)


def split_first_row(first_row: int | Tensor, device: torch.device) -> tuple[Tensor | None, int]:
    """`first_row` for an operator whose kernels read it from memory or take it as a number.

    Returns: an int64 tensor and 0, or None and the integer, for which no memory is filled.
    """
    if isinstance(first_row, Tensor):
        return first_row.to(device, torch.int64), 0
    return None, first_row


def _filled(number: int, device: torch.device) -> Tensor:
    return torch.full((), number, dtype=torch.int64, device=device)


@lru_cache(maxsize=256)
def _kept(number: int, device: torch.device, stream: int) -> Tensor:
    """`_filled` on this stream, whose work alone is sure to come after the fill."""
    with torch.inference_mode(False):  # a tensor of inference mode cannot be saved for a gradient
        return _filled(number, device)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Philox 4x32-10: four 32-bit words (in int64) for each counter; arguments broadcast.

    A 32 x 32 bit multiplication wraps in int64, which leaves its 64 bits right. Its upper half, the
    next counter after two exclusive ors, is masked there; its lower half only ever enters such an
    or, so it may keep its upper bits until the end.
    """
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


class _Draws(NamedTuple):
    """What is drawn for each row."""

    words: int
    num_draws: int
    stream: Stream
    first_row: int | Tensor
    first_draw: int


def _words(num_rows: int, seed: Tensor, of: _Draws) -> tuple[Tensor, ...]:
    """Four word tensors ``[num_rows, num_draws, words]``."""
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


def check_draws(
    seed: Tensor, num_rows: int, width: int, num_draws: int | None, first_row: int | Tensor,
    first_draw: int,
) -> None:  # fmt: skip
    """The arguments of `uniform` and `normal`, with the seed of `as_seed`; reads no tensor.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or range.
    """
    check_integer("num_rows", num_rows, 0)
    check_integer("width", width, 1)
    check_integer("first_draw", first_draw, 0)
    if num_draws is not None:
        check_integer("num_draws", num_draws, 0)
    if seed.dim() == 2 and seed.shape[0] != num_rows:
        raise ValueError(f"seed has {seed.shape[0]} rows for {num_rows} rows of noise")
    if not isinstance(first_row, Tensor):
        check_int64("first_row", first_row)
    elif first_row.numel() != 1 or first_row.dtype not in _INTEGERS:
        raise TypeError(
            f"first_row must hold one integer, got {first_row.dtype} of shape "
            f"{tuple(first_row.shape)}"
        )


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
    seed = as_seed(seed, device)
    check_draws(seed, num_rows, width, num_draws, first_row, first_draw)
    words = math.ceil(width / 4)
    count = 1 if num_draws is None else num_draws
    of = _Draws(words, count, stream, first_row, first_draw)
    drawn = _words(num_rows, seed, of)
    return _to_shape(
        [(part >> 8).to(torch.float32) * 2.0**-24 for part in drawn], width, num_draws, dtype
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
    seed = as_seed(seed, device)
    check_draws(seed, num_rows, width, num_draws, first_row, first_draw)
    words = math.ceil(width / 8)
    count = 1 if num_draws is None else num_draws
    of = _Draws(words, count, stream, first_row, first_draw)
    drawn = _words(num_rows, seed, of)
    slices = []
    for word in drawn:
        fraction = ((word >> _ANGLE_BITS).to(torch.float32) + 0.5) * 2.0**-_RADIUS_BITS
        radius = torch.sqrt(-2.0 * torch.log(fraction))
        step = 2.0 * math.pi / 2**_ANGLE_BITS
        angle = ((word & (2**_ANGLE_BITS - 1)).to(torch.float32) + 0.5) * step - math.pi
        slices += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return _to_shape(slices, width, num_draws, dtype)
