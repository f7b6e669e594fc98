"""Argmax over the vocabulary without the logits."""

import pytest
import torch
from helpers import LargestOutput

from calm_kernels import linear_argmax
from calm_kernels.linear_argmax import eager

SHAPES = [(1, 1, 1), (5, 7, 97), (64, 32, 256), (33, 16, 257), (300, 64, 1000)]


def shape_id(shape):
    return "R{}-H{}-V{}".format(*shape)


@pytest.fixture(params=[False, True], ids=["one-block", "many-blocks"])
def blocks(request, monkeypatch):
    """Run the torch backend with its own blocks, then with blocks that divide nothing evenly."""
    if request.param:
        monkeypatch.setattr(eager, "MAX_ROWS", 7)
        monkeypatch.setattr(eager, "LOGITS_PER_BLOCK", 7 * 19)


def integers(shape, bound, generator):
    """Small integers: logits are exact in any order of summation, and ties are common."""
    return torch.randint(-bound, bound + 1, shape, generator=generator).float()


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_exact_logits_with_ties(shape, dtype, backend, generator):
    rows, width, vocabulary = shape
    hidden = integers((rows, width), 1, generator).to(dtype)
    weight = integers((vocabulary, width), 1, generator).to(dtype)
    logits = hidden.double() @ weight.double().T
    index, largest, logsumexp = linear_argmax(
        hidden, weight, return_max=True, return_logsumexp=True, backend=backend
    )
    assert torch.equal(index, logits.argmax(dim=-1))  # the first of equals
    assert torch.equal(largest.double(), logits.amax(dim=-1))
    assert largest.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Logits are exact; V exponentials are added in tiles, and a logarithm: 8 eps.
    torch.testing.assert_close(logsumexp.double(), logits.logsumexp(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_real_logits_where_the_margin_is_clear(dtype, backend, generator):
    hidden = torch.randn(50, 64, generator=generator).to(dtype)
    weight = torch.randn(500, 64, generator=generator).to(dtype)
    logits = hidden.double() @ weight.double().T  # half-precision inputs lose nothing here
    best = logits.topk(2, dim=-1).values
    is_clear = best[:, 0] - best[:, 1] > 1e-4
    assert is_clear.sum() > 40
    index = linear_argmax(hidden, weight, backend=backend)
    assert torch.equal(index[is_clear], logits.argmax(-1)[is_clear])


def test_literal_case(backend):
    weight = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, -1.0]])
    hidden = torch.tensor([[1.0, 1.0], [1.0, -1.0]])  # logits 1 2 2 and 1 -2 4
    index, largest = linear_argmax(hidden, weight, return_max=True, backend=backend)
    assert index.tolist() == [1, 2]
    assert largest.tolist() == [2.0, 4.0]


@pytest.mark.usefixtures("blocks")
def test_nan_counts_as_the_largest_and_the_first_one_wins(backend, generator):
    hidden = integers((20, 8), 2, generator)
    weight = integers((200, 8), 2, generator)
    weight[[60, 140]] = torch.nan
    hidden[3] = torch.nan
    logits = hidden @ weight.T
    index, largest = linear_argmax(hidden, weight, return_max=True, backend=backend)
    assert torch.equal(index, logits.argmax(dim=-1))
    assert index[3] == 0 and (index[:3] == 60).all()
    assert largest.isnan().all()


@pytest.mark.usefixtures("blocks")
def test_infinite_logits(backend):
    hidden = torch.ones(1, 1)
    weight = torch.full((100, 1), -torch.inf)
    assert linear_argmax(hidden, weight, backend=backend).tolist() == [0]
    weight[50] = -1e30
    assert linear_argmax(hidden, weight, backend=backend).tolist() == [50]
    weight[[70, 80]] = torch.inf
    assert linear_argmax(hidden, weight, backend=backend).tolist() == [70]


def test_what_is_returned(backend, generator):
    hidden, weight = torch.randn(2, 3, 8, generator=generator), torch.randn(9, 8)
    index = linear_argmax(hidden, weight, backend=backend)
    assert index.shape == (2, 3) and index.dtype == torch.int64
    both = linear_argmax(hidden, weight, return_max=True, backend=backend)
    last = linear_argmax(hidden, weight, return_logsumexp=True, backend=backend)
    assert len(both) == len(last) == 2
    assert torch.equal(both[0], index) and torch.equal(last[0], index)
    probability = (both[1] - last[1]).exp()
    expected = (hidden @ weight.T).softmax(dim=-1).amax(dim=-1)
    torch.testing.assert_close(probability, expected)
    assert linear_argmax(hidden[0, 0], weight, backend=backend).shape == ()
    assert linear_argmax(hidden[:, :0], weight, backend=backend).shape == (2, 0)


def test_a_row_does_not_depend_on_the_others(backend, generator):
    hidden, weight = integers((30, 16), 3, generator), integers((120, 16), 3, generator)
    together = linear_argmax(hidden, weight, backend=backend)
    order = torch.randperm(30, generator=generator)
    assert torch.equal(linear_argmax(hidden[order], weight, backend=backend), together[order])


def test_nothing_is_differentiable(backend):
    hidden = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(9, 8, requires_grad=True)
    for result in linear_argmax(
        hidden, weight, return_max=True, return_logsumexp=True, backend=backend
    ):
        assert not result.requires_grad


def test_autocast_multiplies_in_its_dtype(backend, generator):
    hidden, weight = torch.randn(6, 32, generator=generator), torch.randn(40, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, mixed = linear_argmax(hidden.bfloat16(), weight, return_max=True, backend=backend)
    _, plain = linear_argmax(hidden.bfloat16(), weight.bfloat16(), return_max=True, backend=backend)
    assert torch.equal(mixed, plain)


def test_memory_does_not_grow_with_rows_times_vocabulary():
    hidden, weight = torch.randn(3000, 4), torch.randn(4000, 4)
    with LargestOutput() as largest:
        linear_argmax(hidden, weight, return_logsumexp=True, backend="torch")
    assert largest.numel <= eager.LOGITS_PER_BLOCK < hidden.shape[0] * weight.shape[0] / 2


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": torch.zeros(5, 3)}, ValueError, r"weight must have shape \(5, 4\)"),
        ({"weight": torch.zeros(0, 4)}, ValueError, "weight must have at least one row"),
        ({"weight": torch.zeros(4)}, ValueError, "weight must have at least 2 dimensions"),
        ({"weight": torch.zeros(5, 4).double()}, TypeError, "weight must have the dtype of hidden"),
        ({"hidden": torch.zeros(2, 4).long()}, TypeError, "hidden must have dtype.*int64"),
        ({"hidden": None}, TypeError, "hidden must be a tensor, got NoneType"),
    ],
)
def test_bad_input(changes, error, message, backend):
    arguments = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(5, 4), **changes}
    with pytest.raises(error, match=message):
        linear_argmax(**arguments, backend=backend)
