"""The argmax kernels against the torch backend and exact logits."""

from dataclasses import replace

import pytest
import torch

from calm_kernels import linear_argmax, tuning
from calm_kernels.linear_argmax import function, kernels

# Few rows, some, many; vocabularies of one token, of a split that ends inside a block, and odd
# ones; widths that fill no block of features.
SHAPES = [(1, 1, 1), (5, 7, 97), (16, 64, 257), (33, 16, 66), (70, 40, 129)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 16 tokens, so that small vocabularies have many of them."""
    for (name, _), settings in tuning.TABLE.items():
        if name.startswith("linear_argmax"):
            for width, launch in settings.items():
                rows = min(launch.block_rows, 32)
                small = replace(launch, block_rows=rows, block_vocab=16, block_features=32)
                monkeypatch.setitem(settings, width, small)


def shape_id(shape):
    return "R{}-H{}-V{}".format(*shape)


def integers(shape, bound, generator):
    """Small integers: logits are exact in any order of summation, and ties are common."""
    return torch.randint(-bound, bound + 1, shape, generator=generator).float()


def everything(hidden, weight, backend="triton"):
    return linear_argmax(hidden, weight, return_max=True, return_logsumexp=True, backend=backend)


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exact_logits_with_ties(shape, dtype, generator):
    rows, width, vocabulary = shape
    hidden = integers((rows, width), 1, generator).to(dtype)
    weight = integers((vocabulary, width), 1, generator).to(dtype)
    logits = hidden.double() @ weight.double().T
    index, largest, logsumexp = everything(hidden, weight)
    assert index.dtype == torch.int64 and largest.dtype == logsumexp.dtype == torch.float32
    assert torch.equal(index, logits.argmax(dim=-1))  # the first of equals
    assert torch.equal(largest.double(), logits.amax(dim=-1))
    # Logits are exact; V exponentials are added in tiles, and a logarithm: 8 eps.
    torch.testing.assert_close(logsumexp.double(), logits.logsumexp(-1), rtol=1e-6, atol=1e-6)
    alone = linear_argmax(hidden, weight, backend="triton")
    assert torch.equal(alone, index)


@pytest.mark.parametrize("rows", [4, 80])
def test_real_logits_are_those_of_torch(rows, generator):
    hidden = torch.randn(rows, 48, generator=generator)
    weight = torch.randn(133, 48, generator=generator)
    actual, expected = everything(hidden, weight), everything(hidden, weight, "torch")
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1:], expected[1:])


def test_nan_counts_as_the_largest_and_the_first_one_wins(generator):
    hidden, weight = integers((20, 8), 2, generator), integers((100, 8), 2, generator)
    weight[[60, 90]] = torch.nan
    weight[[40, 61], 0], hidden[:, 0] = torch.inf, 1.0  # +inf before a NaN, in its block and after
    hidden[3] = torch.nan
    index, largest, logsumexp = everything(hidden, weight)
    assert torch.equal(index, (hidden @ weight.T).argmax(dim=-1))
    assert index[3] == 0 and (index[:3] == 60).all()
    assert largest.isnan().all() and logsumexp.isnan().all()


def test_infinite_logits():
    hidden, weight = torch.ones(1, 1), torch.full((100, 1), -torch.inf)
    for expected, changes in ((0, {}), (50, {50: -1e30}), (70, {70: torch.inf, 80: torch.inf})):
        for word, value in changes.items():
            weight[word] = value
        index, largest, logsumexp = everything(hidden, weight)
        logits = hidden @ weight.T
        assert index.tolist() == [expected]
        assert torch.equal(largest, logits.amax(-1))
        torch.testing.assert_close(logsumexp, logits.logsumexp(-1))


def test_logits_far_from_zero():
    """Sums of exponentials are taken relative to a maximum that grows along the vocabulary."""
    hidden, weight = torch.ones(2, 1), torch.linspace(-3e4, -100.0, 150)[:, None]
    hidden[1] = -1.0
    expected = (hidden.double() @ weight.double().T).logsumexp(-1)
    # The logit itself is rounded once, the sum adds a few eps of 1: 8 eps of a number above 100.
    torch.testing.assert_close(everything(hidden, weight)[2].double(), expected, rtol=1e-6, atol=0)


def test_strides_and_leading_dimensions(generator):
    hidden = integers((2, 3, 20), 2, generator)
    weight = integers((90, 20), 2, generator)
    expected = (hidden @ weight.T).argmax(-1)
    strided = torch.stack([hidden, hidden], -1)[..., 0]
    turned = weight.T.contiguous().T
    assert torch.equal(linear_argmax(strided, turned, backend="triton"), expected)
    apart = torch.zeros(180, 40)
    apart[::2, ::2] = weight
    assert torch.equal(linear_argmax(hidden, apart[::2, ::2], backend="triton"), expected)
    assert linear_argmax(hidden[0, 0], weight, backend="triton").shape == ()
    assert linear_argmax(hidden[:, :0], weight, backend="triton").shape == (2, 0)


def test_autocast_multiplies_in_its_dtype(generator):
    hidden, weight = torch.randn(6, 32, generator=generator), torch.randn(40, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = everything(hidden, weight)
    plain = everything(hidden.bfloat16(), weight.bfloat16())
    for value, wanted in zip(mixed, plain, strict=True):
        assert torch.equal(value, wanted)


def test_float64_goes_to_torch_or_is_refused():
    hidden, weight = torch.randn(3, 4).double(), torch.randn(5, 4).double()
    assert linear_argmax(hidden, weight, return_max=True)[1].dtype == torch.float64
    with pytest.raises(ValueError, match="no float64"):
        linear_argmax(hidden, weight, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_rows_take_the_matmul_of_the_library(dtype, monkeypatch, generator):
    hidden, weight = (integers((size, 40), 1, generator).to(dtype) for size in (70, 300))
    fused = everything(hidden, weight)
    for name in ("linear_argmax", "linear_argmax.fp32"):
        row = tuning.TABLE[name, tuning.DEFAULT]
        monkeypatch.setitem(row, tuning.MANY, replace(row[tuning.MANY], fused_width=39))
    monkeypatch.setattr(function, "find_maxima", None)
    index, largest, logsumexp = everything(hidden, weight)
    assert torch.equal(index, fused[0]) and torch.equal(largest, fused[1])
    torch.testing.assert_close(logsumexp, fused[2])
    assert torch.equal(linear_argmax(hidden, weight, backend="triton"), index)
    with pytest.raises(TypeError, match="not callable"):  # few rows stay with the kernels
        linear_argmax(hidden[:4], weight, backend="triton")


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 800, 100_000])
@pytest.mark.parametrize("vocab_size", [1, 130, 32_001, 128_256])
def test_splits_cover_the_vocabulary(rows, vocab_size):
    for block_rows, block_vocab in ((16, 128), (64, 128), (128, 256)):
        chosen = {"BLOCK_R": block_rows, "BLOCK_V": block_vocab}
        for slots in (4, 132, 396):
            splits, each = kernels.num_splits(rows, vocab_size, chosen, slots)
            assert (splits - 1) * each < vocab_size <= splits * each
            assert splits <= slots


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_which_rows_the_library_multiplies(arch):
    """Many in half precision, with the log-sum-exp as without; float32 as three of tf32, never."""
    for with_total in (False, True):

        def widest(rows, dtype, with_total=with_total):
            launch = kernels.argmax_setting(rows, dtype, arch, with_total=with_total)
            return launch.fused_width

        assert widest(65, torch.bfloat16) == 4096
        assert widest(64, torch.bfloat16) == widest(65, torch.float32) == tuning.MANY


@pytest.mark.parametrize(("row_blocks", "least"), [(7, 0.9), (100, 0.9), (133, 0.85), (400, 0.85)])
def test_the_last_wave_leaves_few_processors_idle(row_blocks, least):
    vocab_size, slots = 128_256, 132
    chosen = {"BLOCK_R": 128, "BLOCK_V": 256}
    splits, each = kernels.num_splits(128 * row_blocks, vocab_size, chosen, slots)
    waves = -(-row_blocks * splits // slots)
    assert row_blocks * vocab_size > least * waves * slots * each


def test_the_operator_keeps_its_contract():
    operator = torch.ops.calm_kernels.linear_argmax.default
    for with_logsumexp in (True, False):
        arguments = (torch.randn(3, 8), torch.randn(9, 8), with_logsumexp)
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiles_to_one_graph(generator):
    hidden, weight = torch.randn(5, 8, generator=generator), torch.randn(30, 8)

    def function(hidden, weight):
        return everything(2 * hidden, weight)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for value, wanted in zip(compiled(hidden, weight), function(hidden, weight), strict=True):
        assert torch.equal(value, wanted)
