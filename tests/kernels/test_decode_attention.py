"""Attention of a decode step: the portable backends."""

import pytest
import torch
import torch.nn.functional as F
from attention_cases import SIZES, cast, finite, make_case
from helpers import assert_no_worse_than_plain

from calm_kernels import decode_attention
from calm_kernels.decode_attention.api import _obstacle as obstacle


def run(case, dtype, backend):
    """Result and the cache after it."""
    arguments = cast(finite(case), dtype)
    return [decode_attention(*arguments, backend=backend), *arguments[1:3]]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_as_good_as_the_formula(size, dtype, backend, generator):
    case = make_case(size, generator)
    actual = run(case, dtype, backend)
    truth = run(case, torch.float64, "reference")
    assert_no_worse_than_plain(actual, run(case, dtype, "reference"), truth)
    for cache, before in zip(actual[1:], cast(finite(case), dtype)[1:3], strict=True):
        for sequence, length in enumerate(size[-1]):  # one column is written
            others = [column for column in range(size[4]) if column != length]
            assert torch.equal(cache[sequence, :, others], before[sequence, :, others])


def test_literal_constants(backend):
    """A quarter turn makes (1, 0) of the new key and query the (0, 1) of the column before."""
    rows = torch.tensor([[2.0, 0.0, 1.0, 0.0, 5.0, 7.0]], dtype=torch.float64)
    keys, values = torch.zeros(2, 1, 1, 2, 2, dtype=torch.float64)
    keys[0, 0, 0], values[0, 0, 0] = torch.tensor([1.0, 1.0]), torch.tensor([3.0, 1.0])
    rotations = torch.tensor([[1.0], [1j]], dtype=torch.complex128)
    out = decode_attention(rows, keys, values, rotations, torch.tensor([1]), backend=backend)
    torch.testing.assert_close(keys[0, 0, 1], torch.tensor([0.0, 1.0]).double())
    assert values[0, 0, 1].tolist() == [5.0, 7.0]
    torch.testing.assert_close(out[0], torch.tensor([4.0, 4.0]).double())  # equal weights


def test_it_is_causal_attention_of_whole_sequences(backend, generator):
    """Column after column, with heads that share keys, gives the rows of one causal pass."""
    length, kv_heads, group, size = 4, 2, 2, 4
    options = {"generator": generator, "dtype": torch.float64}
    rows = torch.randn(length, 1, (group + 2) * kv_heads * size, **options)
    keys, values = torch.zeros(2, 1, kv_heads, length, size, dtype=torch.float64)
    rotations = torch.ones(length, size // 2, dtype=torch.complex128)
    steps = [
        decode_attention(row, keys, values, rotations, torch.tensor([column]), backend=backend)
        for column, row in enumerate(rows)
    ]
    heads = rows[:, 0].unflatten(1, (-1, size)).transpose(0, 1)
    query, key, value = heads.split((group * kv_heads, kv_heads, kv_heads))
    whole = F.scaled_dot_product_attention(
        query[None], key[None], value[None], is_causal=True, enable_gqa=True
    )
    expected = whole[0].transpose(0, 1).flatten(1)
    torch.testing.assert_close(torch.cat(steps), expected)


def test_no_sequences(backend):
    empty = torch.zeros(0, 2, 3, 4)
    out = decode_attention(
        torch.zeros(0, 24), empty, empty.clone(), torch.ones(3, 2, dtype=torch.complex64),
        torch.zeros(0, dtype=torch.int64), backend=backend,
    )  # fmt: skip
    assert out.shape == (0, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keys": torch.zeros(2, 1, 3)}, ValueError, "keys must have at least 4 dimensions"),
        ({"keys": torch.zeros(2, 1, 3, 5)}, ValueError, "an even number of features, got 5"),
        ({"values": torch.zeros(2, 1, 4, 4)}, ValueError, r"values must have shape \(2, 1, 3, 4\)"),
        ({"values": torch.zeros(2, 1, 3, 4).double()}, TypeError, "values must have dtype float32"),
        ({"query_key_value": torch.zeros(2, 8)}, ValueError, r"got \(2, 8\)"),
        ({"query_key_value": torch.zeros(2, 13)}, ValueError, r"got \(2, 13\)"),
        ({"rotations": torch.zeros(3, 2)}, TypeError, "rotations must have dtype complex64"),
        ({"rotations": torch.ones(2, 2, dtype=torch.complex64)}, ValueError, r"shape \(3, 2\)"),
        ({"lengths": torch.tensor([1])}, ValueError, r"lengths must have shape \(2,\)"),
        ({"lengths": torch.zeros(2)}, TypeError, "lengths must have dtype int64"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    arguments = {
        "query_key_value": torch.zeros(2, 12), "keys": torch.zeros(2, 1, 3, 4),
        "values": torch.zeros(2, 1, 3, 4), "rotations": torch.ones(3, 2, dtype=torch.complex64),
        "lengths": torch.zeros(2, dtype=torch.int64),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        decode_attention(**arguments | change)


@pytest.mark.parametrize(
    ("dtype", "size", "group", "fits"),
    [
        (torch.bfloat16, 128, 64, True), (torch.bfloat16, 258, 1, False),
        (torch.float32, 128, 8, True), (torch.float32, 128, 16, False),
        (torch.float32, 256, 8, False), (torch.float64, 64, 1, False),
    ],
)  # fmt: skip
def test_what_the_kernel_takes(dtype, size, group, fits):
    """In float32 no more than its registers hold without a spill."""
    keys = torch.zeros(1, 1, 3, size, dtype=dtype)
    assert (obstacle(keys, group, keys) is None) is fits


@pytest.mark.parametrize(("rows", "capacity"), [(2, 2**24), (2**24, 2)])
def test_offsets_fit_into_32_bits(rows, capacity):
    """2^31 elements of one head, or of all rows, are left to torch; one column less is not."""

    def obstacle_of(rows, capacity):
        keys = torch.empty(1, 1, capacity, 128, dtype=torch.bfloat16, device="meta")
        return obstacle(keys, 1, keys.new_empty(rows, 128))

    assert "less than 2^31" in obstacle_of(rows, capacity)
    assert obstacle_of(rows - (rows > 2), capacity - (capacity > 2)) is None
