"""The recompute form of the cross-entropy: gradients, what is skipped, what is kept."""

import pytest
import torch
from cross_entropy_cases import IGNORED, make_case, run, shape_id
from helpers import LargestOutput, assert_no_worse_than_plain, leaf, saved_bytes
from torch.utils.flop_counter import FlopCounterMode

from calm_kernels import linear_cross_entropy
from calm_kernels.linear_cross_entropy import eager, recompute

SHAPES = [(1, 1, 1), (6, 8, 97), (33, 16, 257), (3, 5, 12, 50)]
NEGLIGIBLE = 2.0**-12


@pytest.fixture(params=[False, True], ids=["one-tile", "many-tiles"])
def tiles(request, monkeypatch):
    """The form's own tiles, then tiles that divide nothing evenly."""
    if request.param:
        monkeypatch.setattr(eager, "MIN_ROWS", 7)
        monkeypatch.setattr(eager, "LOGITS_PER_BLOCK", 1)
        monkeypatch.setattr(recompute, "TILE_ROWS", 4)
        monkeypatch.setattr(recompute, "TILE_TOKENS", 13)


def peaked_case(generator, num_rows=64, width=16, vocab_size=300):
    """Rows near the weight of their label, as of a trained autoencoder; the last four are not."""
    weight = torch.randn(vocab_size, width, generator=generator, dtype=torch.float64)
    weight = 6.0 * weight / weight.norm(dim=-1, keepdim=True)
    labels = torch.randint(vocab_size, (num_rows,), generator=generator)
    hidden = 4.0 * weight[labels]
    hidden[-4:] = torch.randn(4, width, generator=generator, dtype=torch.float64)
    labels[::9] = IGNORED
    return hidden, weight, labels


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_as_good_as_the_formula(shape, dtype, generator):
    case = make_case(shape, generator, dtype)
    assert_no_worse_than_plain(
        run(case, dtype, "torch", recompute=True),
        run(case, dtype, "reference"),
        run(case, torch.float64, "reference"),
    )


@pytest.mark.usefixtures("tiles")
def test_gradcheck(generator):
    hidden, weight, labels = make_case((8, 5, 29), generator)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, recompute=True, backend="torch"),
        (leaf(hidden), leaf(weight)),
    )


@pytest.mark.usefixtures("tiles")
def test_negligible_entries_are_dropped_whatever_the_tiles(generator):
    case = peaked_case(generator)
    options = {"recompute": True, "negligible": NEGLIGIBLE}
    actual = run(case, torch.float64, "torch", factor=3.0, **options)
    torch.testing.assert_close(
        actual, run(case, torch.float64, "reference", factor=3.0, **options), rtol=1e-12, atol=1e-14
    )
    exact = run(case, torch.float64, "reference", factor=3.0)
    assert not torch.equal(actual[1], exact[1])
    # each entry of softmax - onehot is off by less than NEGLIGIBLE, and is divided by the count
    bound = 3.0 * NEGLIGIBLE / (case[2] != IGNORED).sum() * case[1].abs().sum(0)
    assert ((actual[1] - exact[1]).abs() <= bound).all()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_nan_is_not_negligible(backend, generator):
    hidden, weight, labels = peaked_case(generator)
    hidden[5] = torch.nan
    options = {"recompute": True, "negligible": NEGLIGIBLE}
    loss, dhidden, _ = run((hidden, weight, labels), torch.float64, backend, **options)
    assert loss.isnan() and dhidden[5].isnan().all()


def test_matmuls_of_skipped_tiles_are_saved(monkeypatch, generator):
    """Forward and recomputation take one matmul each, what is kept up to two."""
    monkeypatch.setattr(recompute, "TILE_ROWS", 4)
    monkeypatch.setattr(recompute, "TILE_TOKENS", 50)
    case = peaked_case(generator)
    matmul = 2 * case[0].numel() * case[1].shape[0]
    counts = []
    for negligible in (0.0, NEGLIGIBLE):
        with FlopCounterMode(display=False) as counter:
            run(case, torch.float64, "torch", recompute=True, negligible=negligible)
        counts.append(counter.get_total_flops() / matmul)
    assert counts[0] == 4.0
    assert 2.0 < counts[1] < 2.4  # the last four rows need all their tokens


def test_nothing_of_the_size_of_a_gradient_is_kept():
    hidden = torch.randn(3000, 4, requires_grad=True)
    weight = torch.randn(4000, 4, requires_grad=True)
    labels = torch.randint(4000, (3000,))

    def call():
        return linear_cross_entropy(hidden, weight, labels, recompute=True, backend="torch")

    with LargestOutput() as largest:
        call().backward()
    assert largest.numel <= eager.LOGITS_PER_BLOCK < hidden.shape[0] * weight.shape[0] / 2
    kept, _ = saved_bytes(call)
    inputs = 4 * (hidden.numel() + weight.numel()) + 8 * labels.numel()
    assert kept <= inputs + 4 * hidden.shape[0]  # and a log-sum-exp a row


@pytest.mark.parametrize("rows", [4, 0], ids=["all-ignored", "no-rows"])
def test_without_a_label_the_loss_is_nan_and_the_gradients_zero(rows):
    case = torch.randn(rows, 8), torch.randn(31, 8), torch.full((rows,), IGNORED)
    loss, dhidden, dweight = run(case, torch.float32, "torch", recompute=True)
    assert loss.isnan() and not dhidden.any() and not dweight.any()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_the_gradients_that_are_needed(frozen, generator):
    hidden, weight, labels = make_case((20, 8, 31), generator, torch.float32)
    hidden.requires_grad_(frozen != "hidden")
    weight.requires_grad_(frozen != "weight")
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(hidden, weight, labels, recompute=True, backend="torch").backward()
    assert counter.get_total_flops() == 3 * 2 * hidden.numel() * weight.shape[0]
    assert (hidden.grad is None) == (frozen == "hidden")
    assert (weight.grad is None) == (frozen == "weight")


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # dynamo's own
def test_compiles_to_one_graph(generator):
    case = peaked_case(generator, num_rows=12)
    options = {"recompute": True, "negligible": NEGLIGIBLE, "backend": "torch"}

    def function(hidden, weight):
        return linear_cross_entropy(hidden, weight, case[2], **options)

    results = []
    for call in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
        inputs = leaf(case[0]), leaf(case[1])
        loss = call(*inputs)
        results.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
    torch.testing.assert_close(*results)


def test_what_is_refused(generator):
    hidden, weight, labels = make_case((4, 3, 5), generator, torch.float32)
    with pytest.raises(ValueError, match="negligible needs recompute=True"):
        linear_cross_entropy(hidden, weight, labels, negligible=1e-3)
    with pytest.raises(ValueError, match=r"negligible must lie in \[0, 1\)"):
        linear_cross_entropy(hidden, weight, labels, recompute=True, negligible=1.0)
    loss = linear_cross_entropy(leaf(hidden), weight, labels, recompute=True, backend="torch")
    with pytest.raises(RuntimeError, match="linear_cross_entropy is differentiable once"):
        loss.backward(create_graph=True)
