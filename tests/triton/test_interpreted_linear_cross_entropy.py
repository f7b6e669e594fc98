"""The cross-entropy kernel in its chunks against the torch backend and the float64 reference."""

import math

import pytest
import torch
from cross_entropy_cases import IGNORED, make_case, run, shape_id
from helpers import LargestOutput, assert_no_worse_than_plain, leaf, relative_error, saved_bytes

from calm_kernels import linear_cross_entropy
from calm_kernels.linear_cross_entropy import function

# Vocabularies of one token, within one block of a program, of several blocks, and odd ones.
SHAPES = [(1, 1, 1), (6, 8, 97), (33, 16, 256), (3, 5, 12, 50), (9, 4, 4999)]


@pytest.fixture(params=[False, True], ids=["one-chunk", "many-chunks"])
def chunks(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(function, "block_rows", lambda *sizes: 5)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_as_good_as_the_formula(shape, generator):
    case = make_case(shape, generator, torch.float32)
    plain, truth = run(case, torch.float32, "reference"), run(case, torch.float64, "reference")
    assert_no_worse_than_plain(run(case, torch.float32, "triton"), plain, truth)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_logits_and_gradients_once(dtype, generator):
    hidden, weight, labels = make_case((40, 16, 97), generator, torch.float32)
    case = hidden.to(dtype), 0.3 * weight.to(dtype), labels
    actual = run(case, dtype, "triton", factor=512.0)
    assert [value.dtype for value in actual] == [torch.float32, dtype, dtype]
    truth = run(case, torch.float64, "reference", factor=512.0)
    rounding = torch.finfo(dtype).eps
    for value, exact in zip(actual, truth, strict=True):
        # One rounding of the logits and one of their gradients, each by at most half of eps.
        assert relative_error(value, exact) < 2 * rounding


def test_float16_keeps_small_probabilities(generator):
    """Of 5000 tokens each has probability 2e-4; over many rows their gradients add up."""
    hidden, weight, labels = make_case((12, 4, 5000), generator, torch.float32)
    case = 0.01 * hidden.half(), 0.01 * weight.half(), labels
    actual, truth = (
        run(case, torch.float16, "triton", 64.0),
        run(case, torch.float64, "reference", 64.0),
    )
    assert relative_error(actual[2], truth[2]) < 1e-3


def test_literal_case():
    hidden, weight = torch.zeros(3, 4), torch.randn(8, 4)  # equal logits: log V
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 7, IGNORED]), backend="triton")
    assert loss.item() == pytest.approx(math.log(8))


def test_the_upstream_gradient_scales_all(generator):
    case = make_case((20, 8, 31), generator, torch.float32)
    once, thrice = (run(case, torch.float32, "triton", factor) for factor in (1.0, 3.0))
    torch.testing.assert_close(thrice[1:], [3.0 * gradient for gradient in once[1:]])


def test_large_logits_do_not_overflow(generator):
    hidden, weight, labels = make_case((20, 8, 31), generator, torch.float32)
    actual = run((1e4 * hidden, weight, labels), torch.float32, "triton")
    expected = run((1e4 * hidden, weight, labels), torch.float64, "reference")
    for ours, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [4, 0], ids=["all-ignored", "no-rows"])
def test_without_a_label_the_loss_is_nan_and_the_gradients_zero(rows):
    case = torch.randn(rows, 8), torch.randn(31, 8), torch.full((rows,), IGNORED)
    loss, dhidden, dweight = run(case, torch.float32, "triton")
    assert loss.isnan() and not dhidden.any() and not dweight.any()


def test_an_ignored_row_may_hold_anything(generator):
    hidden, weight, labels = make_case((9, 8, 31), generator, torch.float32)
    expected = run((hidden, weight, labels), torch.float32, "triton")
    hidden[labels == IGNORED] = 1e30
    actual = run((hidden, weight, labels), torch.float32, "triton")
    assert torch.equal(actual[0], expected[0]) and not actual[1][labels == IGNORED].any()
    torch.testing.assert_close(actual[2], expected[2])


def test_a_label_that_is_no_word_makes_the_loss_nan(generator):
    """On a GPU; on the CPU the public function raises."""
    hidden, weight, labels = make_case((9, 8, 31), generator, torch.float32)
    for wrong in (31, -1, 10**9):
        labels[1] = wrong
        loss = function.linear_cross_entropy_triton(hidden, weight, labels, IGNORED, torch.float32)
        assert loss.isnan()


def test_another_ignored_label_and_strided_labels(generator):
    hidden, weight, labels = make_case((30, 8, 31), generator, torch.float32)
    expected = linear_cross_entropy(hidden, weight, labels, backend="triton")
    other = labels.where(labels != IGNORED, 7).where(labels != 7, 7)
    apart = torch.stack([other, other], dim=1)[:, 0]
    actual = linear_cross_entropy(hidden, weight, apart, ignore_index=7, backend="triton")
    wanted = linear_cross_entropy(hidden, weight, other, ignore_index=7, backend="torch")
    torch.testing.assert_close(actual, wanted)
    assert not torch.equal(actual, expected)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both", "no-grad"])
def test_only_the_gradients_that_are_needed(frozen, generator):
    hidden, weight, labels = make_case((20, 8, 31), generator, torch.float32)
    hidden.requires_grad_(frozen not in ("hidden", "both"))
    weight.requires_grad_(frozen not in ("weight", "both"))
    with torch.set_grad_enabled(frozen != "no-grad"):
        loss = linear_cross_entropy(hidden, weight, labels, backend="triton")
    expected = linear_cross_entropy(hidden, weight, labels, backend="torch")
    torch.testing.assert_close(loss, expected)
    assert loss.requires_grad == (frozen in ("hidden", "weight"))
    if loss.requires_grad:
        leaves = [value for value in (hidden, weight) if value.requires_grad]
        actual, wanted = (torch.autograd.grad(value, leaves) for value in (loss, expected))
        torch.testing.assert_close(actual, wanted)


def test_autocast_multiplies_in_its_dtype_and_keeps_gradients_in_theirs(generator):
    hidden, weight, labels = make_case((20, 16, 31), generator, torch.float32)
    inputs = leaf(hidden), leaf(weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(*inputs, labels, backend="triton")
    mixed = [loss.detach(), *torch.autograd.grad(loss, inputs)]
    rounded = (hidden.bfloat16().float(), weight.bfloat16().float(), labels)
    assert [value.dtype for value in mixed] == [torch.float32] * 3
    for value, wanted in zip(mixed, run(rounded, torch.float32, "torch"), strict=True):
        assert relative_error(value, wanted) < 1e-2


def test_tied_weights_get_both_gradients(generator):
    """The weight is the embedding, too: its two gradients are added by autograd."""
    _, weight, labels = make_case((20, 8, 31), generator, torch.float32)
    results = []
    for backend in ("triton", "torch"):
        tied = leaf(weight)
        hidden = tied[labels.clamp(min=0)].sin()
        loss = linear_cross_entropy(hidden, tied, labels, backend=backend)
        results.append(torch.autograd.grad(loss, tied)[0])
    torch.testing.assert_close(*results)


def test_memory_is_one_chunk_of_logits(monkeypatch):
    monkeypatch.setattr(function, "LOGITS_BYTES", 4 * 128 * 1008)
    hidden = torch.randn(600, 4, requires_grad=True)
    weight = torch.randn(1000, 4, requires_grad=True)
    labels = torch.full((600,), IGNORED)  # rows without work: the interpreter is slow
    labels[::100] = 5

    def call():
        return linear_cross_entropy(hidden, weight, labels, backend="triton")

    with LargestOutput() as largest:
        call().backward()
    assert largest.numel <= 128 * 1008
    kept, _ = saved_bytes(call)
    assert kept <= 4 * (hidden.numel() + weight.numel() + 1)  # the gradients


@pytest.mark.parametrize("rows", [1, 127, 4096, 32768, 100_000])
@pytest.mark.parametrize("vocab_size", [50, 32_001, 128_256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_blocks_are_as_large_as_memory_allows(rows, vocab_size, itemsize):
    size = function.block_rows(rows, vocab_size, itemsize)
    row_bytes = function.row_stride(vocab_size) * itemsize
    assert size * row_bytes <= function.LOGITS_BYTES
    num_blocks = -(-rows // size)
    assert (num_blocks - 1) * function.LOGITS_BYTES < rows * row_bytes * 1.1
    assert function.block_rows(32768, 128_256, 2) == 8192


def test_float64_and_second_derivatives_are_refused(generator):
    hidden, weight, labels = make_case((4, 3, 5), generator, torch.float32)
    assert linear_cross_entropy(hidden.double(), weight.double(), labels).dtype == torch.float64
    with pytest.raises(ValueError, match="no float64"):
        linear_cross_entropy(hidden.double(), weight.double(), labels, backend="triton")
    with pytest.raises(ValueError, match="no form that recomputes"):
        linear_cross_entropy(hidden, weight, labels, recompute=True, backend="triton")
    assert linear_cross_entropy(hidden, weight, labels, recompute=True).isfinite()  # auto: torch
    hidden = leaf(hidden)
    loss = linear_cross_entropy(hidden, weight, labels, backend="triton")
    with pytest.raises(RuntimeError, match="linear_cross_entropy is differentiable once"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_the_operator_keeps_its_contract(generator):
    hidden, weight, labels = make_case((6, 4, 9), generator, torch.float32)
    hidden, weight = leaf(hidden), leaf(weight)
    operator = torch.ops.calm_kernels.linear_cross_entropy.default
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for needs in ((True, True), (False, True)):
        arguments = (hidden, weight, labels, IGNORED, torch.float32, *needs)
        torch.library.opcheck(operator, arguments, test_utils=tests)


def test_compiles_to_one_graph(generator):
    hidden, weight, labels = make_case((6, 4, 97), generator, torch.float32)

    def step(hidden, weight):
        return linear_cross_entropy(hidden, weight, labels, backend="triton")

    results = []
    for call in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        inputs = leaf(hidden), leaf(weight)
        loss = call(*inputs)
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    torch.testing.assert_close(*results)
