"""Products through oneDNN are those of `torch.nn.functional.linear`, gradients included."""

import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_no_worse_than_plain, leaf

from calm_kernels import products
from calm_kernels.threads import one_thread, threads_for

SHAPES = [(64, 256, 128), (1001, 97, 257), (33, 512, 64), (7, 1000, 1001)]


def layouts():
    """A matrix of the given shape in every layout that products meet."""
    return {
        "contiguous": lambda rows, columns: torch.randn(rows, columns),
        "transposed": lambda rows, columns: torch.randn(columns, rows).T,
        "slice": lambda rows, columns: torch.randn(rows, 2 * columns)[:, columns:],
        "expanded": lambda rows, columns: torch.randn(columns).expand(rows, columns),
    }


def gradients(function, inputs, dtype=torch.float32):
    inputs = [leaf(value, dtype) if value is not None else None for value in inputs]
    output = function(*inputs)
    factors = torch.linspace(-1, 1, output.numel(), dtype=dtype).view(output.shape)
    wanted = [value for value in inputs if value is not None]
    return [output.detach(), *torch.autograd.grad((output * factors).sum(), wanted)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "R{}-I{}-O{}".format(*s))
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
def test_linear_and_its_gradients(shape, has_bias):
    rows, width, out = shape
    inputs = [torch.randn(rows, width), torch.randn(out, width), torch.randn(out)]
    inputs[2] = inputs[2] if has_bias else None
    assert products._use_onednn(*inputs[:2]) == products._has_onednn()
    assert_no_worse_than_plain(
        gradients(products.linear, inputs),
        gradients(F.linear, inputs),
        gradients(F.linear, inputs, torch.float64),
    )


@pytest.mark.parametrize("left_layout", layouts())
@pytest.mark.parametrize("right_layout", layouts())
def test_multiply_and_outer_in_every_layout(left_layout, right_layout):
    left, right = layouts()[left_layout](256, 96), layouts()[right_layout](130, 96)
    torch.testing.assert_close(products.multiply(left, right), left @ right.T)
    rows, words = layouts()[left_layout](4, 96), layouts()[right_layout](4096, 96)
    torch.testing.assert_close(products.multiply(rows, words), rows @ words.T)  # a chunk's slots
    left, right = layouts()[left_layout](256, 96), layouts()[right_layout](256, 130)
    torch.testing.assert_close(products.outer(left, right), left.T @ right, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(products.outer(right, left), right.T @ left, atol=1e-4, rtol=1e-5)


@pytest.mark.skipif(not products._has_onednn(), reason="this torch has no oneDNN product")
def test_matrices_with_gaps_are_copied_first(monkeypatch):
    """oneDNN takes them, 50 times slower."""
    seen = []
    wrapped = torch.ops.mkldnn._linear_pointwise

    def record(left, right, *rest):
        seen.extend([left, right])
        return wrapped(left, right, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", record)
    weight = torch.randn(128, 256)[:, :128].requires_grad_()
    inputs = torch.randn(100, 300)[:, 100:228].requires_grad_()
    products.linear(inputs, weight).sum().backward()
    assert len(seen) == 6
    assert all(matrix.is_contiguous() or matrix.T.is_contiguous() for matrix in seen)


def test_second_derivatives():
    inputs, weight = leaf(torch.randn(64, 128)), leaf(torch.randn(128, 128))
    results = []
    for function in (products.linear, F.linear):
        output = function(inputs, weight).square().mean()
        first = torch.autograd.grad(output, (inputs, weight), create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        results.append(torch.autograd.grad(penalty, (inputs, weight)))
    torch.testing.assert_close(*results)


def test_leading_dimensions_and_empty_inputs():
    weight, bias = torch.randn(300, 64), torch.randn(300)
    inputs = torch.randn(5, 30, 64)
    torch.testing.assert_close(
        products.linear(inputs, weight, bias), F.linear(inputs, weight, bias)
    )
    assert products.linear(inputs[:0], weight, bias).shape == (0, 30, 300)


def test_only_the_gradients_that_are_needed():
    inputs, weight = torch.randn(100, 128), torch.randn(128, 128, requires_grad=True)
    products.linear(inputs, weight, torch.zeros(128)).sum().backward()
    assert inputs.grad is None
    torch.testing.assert_close(
        weight.grad, inputs.sum(dim=0).expand(128, 128), atol=1e-4, rtol=1e-5
    )


@pytest.mark.skipif(not products._has_onednn(), reason="this torch has no oneDNN product")
def test_when_onednn_is_left_alone():
    left, right = torch.randn(256, 128), torch.randn(128, 128)
    assert products._use_onednn(left, right)
    assert not products._use_onednn(left.double(), right.double())
    assert not products._use_onednn(left[:2], right)
    with torch.autocast("cpu"):
        assert not products._use_onednn(left, right)
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        assert not products._use_onednn(left, right)


@pytest.mark.parametrize("spin", [True, False], ids=["spin", "sleep"])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("lead", [(), (1,), (1, 1)], ids=str)
def test_one_row(monkeypatch, spin, has_bias, lead):
    monkeypatch.setattr(products, "threads_spin", lambda: spin)
    inputs = [torch.randn(*lead, 256), torch.randn(512, 256), torch.randn(512)]
    inputs[2] = inputs[2] if has_bias else None
    assert products.prefers_columns(inputs[1]) == (not spin)
    assert_no_worse_than_plain(
        gradients(products.linear, inputs),
        gradients(F.linear, inputs),
        gradients(F.linear, inputs, torch.float64),
    )


@pytest.mark.parametrize("shape", [(2, 128), (64, 128), (128,)], ids=str)
def test_shapes_that_do_not_fit(monkeypatch, shape):
    """As many elements as one row has are no row."""
    monkeypatch.setattr(products, "threads_spin", lambda: True)
    with pytest.raises(RuntimeError):
        products.linear(torch.randn(*shape), torch.randn(512, 256))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_small_work_keeps_to_one_thread(monkeypatch):
    seen = []
    plain = F.linear

    def record(*arguments):
        seen.append(torch.get_num_threads())
        return plain(*arguments)

    monkeypatch.setattr(F, "linear", record)
    weight = torch.randn(64, 32, dtype=torch.float64)
    products.linear(torch.randn(4, 32, dtype=torch.float64), weight)
    products.linear(torch.randn(4096, 32, dtype=torch.float64), weight)
    assert seen == [1, 2] and torch.get_num_threads() == 2
    with threads_for(2**10, weight):
        assert torch.get_num_threads() == 1
    for multiplications, inputs in ((2**20, weight), (2**10, weight.to("meta"))):
        with threads_for(multiplications, inputs):
            assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("kind", "count"), [("Server", 2), ("TMonitor", 1)])
def test_other_python_threads_keep_theirs(kind, count):
    """A thread takes over the process's count when it first asks torch for work."""
    may_end = threading.Event()
    other = type(kind, (threading.Thread,), {})(target=may_end.wait)
    other.start()
    try:
        with one_thread():
            assert torch.get_num_threads() == count
    finally:
        may_end.set()
        other.join()
    with one_thread():
        assert torch.get_num_threads() == 1


@pytest.mark.usefixtures("two_threads")
def test_an_error_gives_the_threads_back():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        products.linear(torch.randn(4, 32), torch.randn(64, 31))
    assert torch.get_num_threads() == 2
    with one_thread(), one_thread():
        pass
    assert torch.get_num_threads() == 2


def test_a_compiled_product_is_one_graph():
    """Threads cannot be counted inside a graph."""
    compiled = torch.compile(products.linear, backend="eager", fullgraph=True)
    inputs, weight = torch.randn(3, 8), torch.randn(5, 8)
    torch.testing.assert_close(compiled(inputs, weight), F.linear(inputs, weight))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_derivatives_and_vmap():
    """Transformed products are torch's own, which know how."""
    inputs, weight, tangent = torch.randn(4, 64, 256), torch.randn(128, 256), torch.randn(64, 256)
    assert products._use_onednn(inputs[0], weight) == products._has_onednn()

    def product(function):
        return lambda rows: function(rows, weight).square()

    for transform in (
        lambda f: torch.func.jvp(f, (inputs[0],), (tangent,))[1],
        lambda f: torch.vmap(f)(inputs),
        lambda f: torch.func.grad(lambda rows: f(rows).sum())(inputs[0]),
    ):
        torch.testing.assert_close(
            transform(product(products.linear)), transform(product(F.linear)), rtol=1e-4, atol=1e-3
        )
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs[0], tangent)
        actual = torch.autograd.forward_ad.unpack_dual(products.linear(dual, weight)).tangent
    torch.testing.assert_close(actual, F.linear(tangent, weight), rtol=1e-4, atol=1e-3)
