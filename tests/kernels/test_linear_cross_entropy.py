"""Cross-entropy of a linear layer without its logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_cases import IGNORED, make_case, run, shape_id
from helpers import LargestOutput, assert_no_worse_than_plain, leaf, saved_bytes
from torch.utils.flop_counter import FlopCounterMode

from calm_kernels import linear_cross_entropy
from calm_kernels.linear_cross_entropy import eager

SHAPES = [(1, 1, 1), (6, 8, 97), (64, 32, 256), (33, 16, 257), (3, 5, 12, 50)]


@pytest.fixture(params=[False, True], ids=["one-block", "many-blocks"])
def blocks(request, monkeypatch):
    """Run the torch backend with its own blocks, then with blocks of seven rows."""
    if request.param:
        monkeypatch.setattr(eager, "MIN_ROWS", 7)
        monkeypatch.setattr(eager, "LOGITS_PER_BLOCK", 1)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_as_good_as_the_formula(shape, dtype, backend, generator):
    case = make_case(shape, generator, dtype)
    actual = run(case, dtype, backend)
    assert actual[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_no_worse_than_plain(
        actual, run(case, dtype, "reference"), run(case, torch.float64, "reference")
    )


def test_is_torch_cross_entropy(backend, generator):
    hidden, weight, labels = make_case((40, 8, 97), generator)
    expected = F.cross_entropy(hidden @ weight.T, labels)
    torch.testing.assert_close(
        linear_cross_entropy(hidden, weight, labels, backend=backend), expected
    )


def test_literal_case(backend):
    hidden = torch.zeros(3, 4)  # equal logits: log V
    weight = torch.randn(8, 4)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 7, IGNORED]), backend=backend)
    assert loss.item() == pytest.approx(math.log(8))


@pytest.mark.usefixtures("blocks")
def test_gradcheck(backend, generator):
    hidden, weight, labels = make_case((8, 5, 11), generator)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, backend=backend),
        (leaf(hidden), leaf(weight)),
    )


def test_the_upstream_gradient_scales_all(backend, generator):
    case = make_case((20, 8, 31), generator)
    once = run(case, torch.float64, backend)
    thrice = run(case, torch.float64, backend, factor=3.0)
    torch.testing.assert_close(thrice[1:], [3.0 * gradient for gradient in once[1:]])


@pytest.mark.usefixtures("blocks")
def test_large_logits_do_not_overflow(backend, generator):
    hidden, weight, labels = make_case((20, 8, 31), generator)
    actual = run((1e4 * hidden, weight, labels), torch.float32, backend)
    expected = run((1e4 * hidden, weight, labels), torch.float64, "reference")
    for ours, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


def test_only_counted_rows_matter(backend, generator):
    hidden, weight, labels = make_case((30, 8, 31), generator)
    counted = labels != IGNORED
    everything = run((hidden, weight, labels), torch.float64, backend)
    compact = run((hidden[counted], weight, labels[counted]), torch.float64, backend)
    torch.testing.assert_close(everything[0], compact[0])
    assert not everything[1][~counted].any()
    torch.testing.assert_close(everything[1][counted], compact[1])
    torch.testing.assert_close(everything[2], compact[2])


def test_another_ignored_label(backend, generator):
    hidden, weight, labels = make_case((30, 8, 31), generator)
    expected = linear_cross_entropy(hidden, weight, labels, backend=backend)
    labels[labels == IGNORED] = -1
    actual = linear_cross_entropy(hidden, weight, labels, ignore_index=-1, backend=backend)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("rows", [4, 0], ids=["all-ignored", "no-rows"])
def test_without_a_label_the_loss_is_nan_and_the_gradients_zero(rows, backend):
    hidden, weight = torch.randn(rows, 8), torch.randn(31, 8)
    labels = torch.full((rows,), IGNORED)
    loss, dhidden, dweight = run((hidden, weight, labels), torch.float32, backend)
    assert loss.isnan() and F.cross_entropy(hidden @ weight.T, labels).isnan()
    assert not dhidden.any() and not dweight.any()


def test_rows_in_another_order(backend, generator):
    hidden, weight, labels = make_case((24, 8, 31), generator)
    order = torch.randperm(24, generator=generator)
    loss, dhidden, dweight = run((hidden, weight, labels), torch.float64, backend)
    shuffled = run((hidden[order], weight, labels[order]), torch.float64, backend)
    torch.testing.assert_close(shuffled, [loss, dhidden[order], dweight])


def test_autocast_multiplies_in_its_dtype_and_keeps_gradients_in_theirs(backend, generator):
    hidden, weight, labels = make_case((20, 16, 31), generator, torch.float32)
    inputs = leaf(hidden), leaf(weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(*inputs, labels, backend=backend)
    mixed = [loss.detach(), *torch.autograd.grad(loss, inputs)]
    rounded = (hidden.bfloat16().float(), weight.bfloat16().float(), labels)
    expected = run(rounded, torch.float32, backend)
    assert [value.dtype for value in mixed] == [torch.float32] * 3
    torch.testing.assert_close(mixed[0], expected[0])
    torch.testing.assert_close(mixed[1:], expected[1:], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("frozen", "products"), [("none", 3), ("hidden", 2), ("weight", 2), ("both", 1), ("no-grad", 1)]
)
def test_only_the_products_that_are_needed(frozen, products, generator):
    hidden, weight, labels = make_case((20, 8, 31), generator)
    hidden.requires_grad_(frozen not in ("hidden", "both"))
    weight.requires_grad_(frozen not in ("weight", "both"))
    with torch.set_grad_enabled(frozen != "no-grad"), FlopCounterMode(display=False) as counter:
        loss = linear_cross_entropy(hidden, weight, labels, backend="torch")
    assert counter.get_total_flops() == products * 2 * hidden.numel() * weight.shape[0]
    if loss.requires_grad:
        loss.backward()
        assert (hidden.grad is None) == (frozen == "hidden")
        assert (weight.grad is None) == (frozen == "weight")


def test_memory_does_not_grow_with_rows_times_vocabulary():
    hidden = torch.randn(3000, 4, requires_grad=True)
    weight = torch.randn(4000, 4, requires_grad=True)
    labels = torch.randint(4000, (3000,))

    def call():
        return linear_cross_entropy(hidden, weight, labels, backend="torch")

    with LargestOutput() as largest:
        call().backward()
    assert largest.numel <= eager.LOGITS_PER_BLOCK < hidden.shape[0] * weight.shape[0] / 2
    kept, _ = saved_bytes(call)
    assert kept <= 4 * (hidden.numel() + weight.numel())  # the gradients


def test_no_second_derivative(generator):
    hidden, weight, labels = make_case((4, 3, 5), generator)
    hidden = leaf(hidden)
    loss = linear_cross_entropy(hidden, weight, labels, backend="torch")
    with pytest.raises(RuntimeError, match="linear_cross_entropy is differentiable once"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # dynamo's own
def test_compiles_to_one_graph(generator):
    hidden, weight, labels = make_case((6, 4, 97), generator)

    def function(hidden, weight):
        return linear_cross_entropy(hidden, weight, labels, backend="torch")

    results = []
    for call in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
        inputs = leaf(hidden), leaf(weight)
        loss = call(*inputs)
        results.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"labels": torch.zeros(3).long()}, ValueError, r"labels must have shape \(2,\)"),
        ({"labels": torch.zeros(2)}, TypeError, "labels must have dtype int64"),
        ({"labels": torch.tensor([0, 5])}, ValueError, r"labels must lie in \[0, 5\).*got 5"),
        ({"labels": torch.tensor([-1, 0])}, ValueError, r"labels must lie in.*-100; got -1"),
        ({"weight": torch.zeros(5, 3)}, ValueError, "weight must have shape"),
        ({"weight": torch.zeros(5, 4).half()}, TypeError, "weight must have the dtype of hidden"),
        ({"hidden": torch.tensor(1.0)}, ValueError, "hidden must have at least 1 dimensions"),
    ],
)
def test_bad_input(changes, error, message, backend):
    arguments = {
        "hidden": torch.zeros(2, 4),
        "weight": torch.zeros(5, 4),
        "labels": torch.zeros(2).long(),
        **changes,
    }
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments, backend=backend)
