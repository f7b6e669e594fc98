"""Attention of a decode step in the interpreter, against the formula in float64."""

import pytest
import torch
from attention_cases import SIZES, cast, finite, make_case
from helpers import assert_no_worse_than_plain, relative_error

from calm_kernels import decode_attention
from calm_kernels.decode_attention import kernels
from calm_kernels.decode_attention.kernels import num_splits

# Blocks of 32 columns: parts that are empty, of one block or more, with columns missing.
LONG = [
    (1, 1, 2, 8, 140, (139,)),
    (1, 1, 1, 34, 140, (2,)),
    (2, 1, 1, 8, 140, (101, 31)),
    (1, 1, 17, 4, 40, (33,)),
]


def run(case, dtype, backend):
    """Result and the cache after it."""
    arguments = cast(case, dtype)
    return [decode_attention(*arguments, backend=backend), *arguments[1:3]]


@pytest.mark.parametrize("size", SIZES + LONG, ids=str)
def test_as_good_as_the_formula(size, generator):
    """Columns that are not filled hold NaN, and stay what they are."""
    case = make_case(size, generator)
    actual = run(case, torch.float32, "triton")
    plain, truth = (run(case, dtype, "reference") for dtype in (torch.float32, torch.float64))
    for values in (actual, plain, truth):
        assert torch.equal(values[1].isnan(), truth[1].isnan())
        values[1:] = [value.nan_to_num(0.0) for value in values[1:]]
    assert_no_worse_than_plain(actual, plain, truth)


def test_parts_are_counted_and_the_count_returns_to_zero(generator, monkeypatch):
    """Two calls with the same counts; in any number of parts the sums differ by rounding alone."""
    case = finite(make_case(LONG[0], generator))
    arrivals, results = torch.zeros(1, dtype=torch.int32), []
    for most in (1, 2, 4, 4):
        monkeypatch.setattr(kernels, "MAX_SPLITS", most)
        results.append(
            decode_attention(*cast(case, torch.float32), arrivals=arrivals, backend="triton")
        )
        assert not arrivals.any()
    assert torch.equal(results[2], results[3])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-6)


def test_a_sequence_does_not_depend_on_the_others(generator):
    case = cast(make_case(LONG[2], generator), torch.float32)
    together = decode_attention(*case, backend="triton")
    rows, keys, values, rotations, lengths = case
    for index in (0, 1):
        part = slice(index, index + 1)
        alone = decode_attention(
            rows[part], keys[part], values[part], rotations, lengths[part], backend="triton"
        )
        torch.testing.assert_close(alone, together[part], rtol=1e-5, atol=1e-6)


def test_bfloat16(generator):
    case = cast(make_case(LONG[2], generator), torch.bfloat16)
    exact = make_case(LONG[2], torch.Generator().manual_seed(0))[3:]
    truth = run((*case[:3], *exact), torch.float64, "reference")
    actual = decode_attention(*case, backend="triton")
    assert actual.dtype == torch.bfloat16 and relative_error(actual, truth[0]) < 0.02


def test_empty_and_refused(generator):
    case = cast(make_case(SIZES[1], generator), torch.float32)
    none = [tensor[:0] for tensor in case[:3]]
    out = decode_attention(*none, case[3], case[4][:0], backend="triton")
    assert out.shape == (0, 16)
    half = cast(make_case(SIZES[1], generator), torch.float16)
    with pytest.raises(ValueError, match="takes float32 and bfloat16"):
        decode_attention(*half, backend="triton")
    with pytest.raises(ValueError, match="arrivals must hold 4 contiguous counts"):
        decode_attention(*case, arrivals=torch.zeros(3, dtype=torch.int32), backend="triton")
    with pytest.raises(ValueError, match="takes contiguous tensors"):
        spread = [case[0], case[1].transpose(1, 2).contiguous().transpose(1, 2), *case[2:]]
        decode_attention(*spread, backend="triton")


@pytest.mark.parametrize(
    ("pairs", "capacity", "expected"), [(16, 512, 8), (1, 512, 8), (1, 2048, 16), (1024, 512, 1),
                                        (64, 512, 2), (1, 64, 1), (12, 2048, 8)],
)  # fmt: skip
def test_number_of_parts(pairs, capacity, expected):
    """A power of two; a block of 64 columns each, and no more programs than 132 processors."""
    assert num_splits(pairs, capacity, 132, 64) == expected
