"""Layers of a decode step: the torch backend against the reference backend."""

import pytest
import torch

from benchmarks.measure import Baseline, compare
from benchmarks.shapes import DECODING_LAYER
from calm_kernels import decode_attention, linear_residual, norm_linear, norm_swiglu

REFERENCE = "reference backend"
EPS = 1e-6


@pytest.mark.benchmark(group="layer without attention, 1 row")
@torch.no_grad()
def bench_layers(benchmark):
    width, inner = DECODING_LAYER.hidden_size, DECODING_LAYER.intermediate_size
    rows, factor = torch.randn(1, width), torch.ones(width)
    *joined, output = (width**-0.5 * torch.randn(width, width) for _ in range(4))
    gate, up, down = (width**-0.5 * torch.randn(inner, width) for _ in range(3))
    down = down.T.contiguous()

    def run(backend):
        query = norm_linear(rows, factor, joined, norm_eps=EPS, backend=backend)
        hidden = linear_residual(query[:, :width], output, rows, backend=backend)
        features = norm_swiglu(hidden, factor, gate, up, norm_eps=EPS, backend=backend)
        return linear_residual(features, down, hidden, backend=backend)

    baseline = Baseline(lambda: run("reference"))
    compare(benchmark, lambda: run("torch"), {REFERENCE: baseline}, shape=DECODING_LAYER)


@pytest.mark.benchmark(group="decode_attention, 1 sequence")
@torch.no_grad()
def bench_decode_attention(benchmark):
    heads, size = DECODING_LAYER.num_heads, DECODING_LAYER.head_size
    capacity = DECODING_LAYER.capacity
    keys, values = torch.randn(2, 1, heads, capacity, size)
    rows, angle = torch.randn(1, 3 * heads * size), torch.randn(capacity, size // 2)
    rotations, lengths = torch.polar(torch.ones_like(angle), angle), torch.tensor([capacity - 1])

    def run(backend):
        return decode_attention(rows, keys, values, rotations, lengths, backend=backend)

    baseline = Baseline(lambda: run("reference"))
    compare(benchmark, lambda: run("torch"), {REFERENCE: baseline}, shape=DECODING_LAYER)
