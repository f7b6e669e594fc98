"""Operations over the vocabulary against logits in memory, and torch's own fused loss."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from benchmarks.measure import Baseline, compare
from benchmarks.shapes import PROJECTION
from calm_kernels import linear_argmax, linear_cross_entropy, softmax_draws

REFERENCE = "logits in memory"


@pytest.mark.parametrize("rows", [4, PROJECTION.num_rows])
@torch.no_grad()
def bench_linear_argmax(benchmark, rows):
    benchmark.group = f"linear_argmax, {rows} rows, fwd"
    shape = dataclasses.replace(PROJECTION, num_rows=rows)
    hidden = torch.randn(rows, shape.hidden_size)
    weight = torch.randn(shape.vocab_size, shape.hidden_size)

    def plain():
        return (hidden @ weight.T).argmax(dim=-1)

    def ours():
        return linear_argmax(hidden, weight, backend="torch")

    compare(benchmark, ours, {REFERENCE: Baseline(plain, rtol=0, atol=0)}, shape=shape)


@pytest.mark.benchmark(group="softmax_draws")
def bench_softmax_draws(benchmark):
    """A token for each of a few sequences, against a loop over them in float64."""
    shape = dataclasses.replace(PROJECTION, num_rows=16)
    logits = torch.randn(shape.num_rows, shape.vocab_size)

    def run(backend):
        return softmax_draws(logits, seed=1, backend=backend)[0]

    baseline = Baseline(lambda: run("reference"), rtol=0, atol=0)
    compare(benchmark, lambda: run("torch"), {"reference backend": baseline}, shape=shape)


def loss_inputs():
    hidden = torch.randn(PROJECTION.num_rows, PROJECTION.hidden_size)
    weight = torch.randn(PROJECTION.vocab_size, PROJECTION.hidden_size) * 0.05
    labels = torch.randint(PROJECTION.vocab_size, (PROJECTION.num_rows,))
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def ours(*inputs):
    return linear_cross_entropy(*inputs, backend="torch")


def plain(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight), labels)


def baselines():
    """Losses of (hidden, weight, labels); torch has one of its own since 2.13."""
    found = {REFERENCE: plain}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch's own, chunked"] = lambda *i: F.linear_cross_entropy(*i, options=options)
    return found


@pytest.mark.benchmark(group="linear_cross_entropy, fwd+bwd")
@pytest.mark.filterwarnings("ignore")
def bench_linear_cross_entropy(benchmark):
    *leaves, labels = loss_inputs()

    def step(loss):
        return torch.autograd.grad(loss(*leaves, labels), leaves)

    runs = {name: Baseline(lambda loss=loss: step(loss)) for name, loss in baselines().items()}
    compare(benchmark, lambda: step(ours), runs, shape=PROJECTION)


@pytest.mark.benchmark(group="linear_cross_entropy, fwd+bwd, certain rows")
def bench_linear_cross_entropy_recompute(benchmark):
    """Rows whose label has nearly all probability, as of a trained autoencoder."""
    _, weight, labels = loss_inputs()
    hidden = (20.0 * weight[labels]).detach().requires_grad_()

    def step(**options):
        loss = linear_cross_entropy(hidden, weight, labels, backend="torch", **options)
        return torch.autograd.grad(loss, (hidden, weight))

    compare(
        benchmark,
        lambda: step(recompute=True, negligible=2.0**-12),
        {"gradients at once": Baseline(step)},
        shape=PROJECTION,
    )


@pytest.mark.benchmark(group="linear_cross_entropy, fwd")
@torch.no_grad()
def bench_linear_cross_entropy_forward(benchmark):
    inputs = loss_inputs()
    baseline = Baseline(lambda: plain(*inputs), rtol=1.3e-6)
    compare(benchmark, lambda: ours(*inputs), {REFERENCE: baseline}, shape=PROJECTION)
