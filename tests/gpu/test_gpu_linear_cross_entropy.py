"""The cross-entropy in chunks at full size: parity, graphs, memory, no synchronisation."""

import pytest
import torch
from gpu_cases import relative_error

from calm_kernels import linear_cross_entropy

# Relative error of loss and gradients: logits and their gradients are rounded to the dtype once.
ERROR = {torch.bfloat16: 6e-3, torch.float16: 2e-3, torch.float32: 2e-3}


def make_inputs(rows, vocab_size, width, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(1)
    options = {"device": "cuda", "generator": generator}
    hidden = torch.randn(rows, width, **options).to(dtype).requires_grad_()
    weight = (0.05 * torch.randn(vocab_size, width, **options)).to(dtype).requires_grad_()
    labels = torch.randint(vocab_size, (rows,), **options)
    labels[::7] = -100
    return hidden, weight, labels


def run(inputs, backend):
    *leaves, labels = inputs
    loss = linear_cross_entropy(*leaves, labels, backend=backend)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize(
    ("rows", "vocab_size", "width"), [(5, 7, 8), (1000, 32_001, 72), (9000, 128_256, 512)]
)
def test_parity(rows, vocab_size, width, dtype):
    inputs = make_inputs(rows, vocab_size, width, dtype)
    actual = run(inputs, "triton")
    wide = [value.detach().float().requires_grad_() for value in inputs[:2]]
    for value, wanted in zip(actual, run([*wide, inputs[2]], "torch"), strict=True):
        assert torch.isfinite(value).all()
        assert relative_error(value, wanted) < ERROR[dtype]


def test_autocast_keeps_the_gradient_of_the_weight_in_float32():
    hidden, weight, labels = make_inputs(4096, 32_000, 256, torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        actual = run((hidden, weight, labels), "triton")
    for value, wanted in zip(actual, run((hidden, weight, labels), "torch"), strict=True):
        assert value.dtype == torch.float32 and relative_error(value, wanted) < 6e-3


def test_recomputed_gradients_wait_for_nothing():
    hidden, weight, labels = make_inputs(3000, 8000, 64)
    expected = run((hidden, weight, labels), "torch")

    def recomputed():
        loss = linear_cross_entropy(
            hidden, weight, labels, recompute=True, negligible=1e-8, backend="torch"
        )
        return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]

    recomputed()  # the library allocates its workspace
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = recomputed()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for value, wanted in zip(actual, expected, strict=True):
        assert relative_error(value, wanted) < ERROR[torch.bfloat16]


def test_memory_of_the_reference_size():
    inputs = make_inputs(32_768, 128_256, 512)
    run((inputs[0][:256], *inputs[1:2], inputs[2][:256]), "triton")  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(inputs, "triton")
    assert torch.cuda.max_memory_allocated() - before <= 2.5e9


def test_a_captured_graph_takes_new_labels():
    hidden, weight, labels = make_inputs(2048, 32_000, 256)
    run((hidden, weight, labels), "triton")
    torch.cuda.set_sync_debug_mode("error")  # nothing may wait for the device
    try:
        run((hidden, weight, labels), "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run((hidden, weight, labels), "triton")
    for ignored in (labels == labels, labels < 16_000):
        labels.copy_(torch.where(ignored, labels, -100))
        graph.replay()
        for value, wanted in zip(replayed, run((hidden, weight, labels), "triton"), strict=True):
            assert torch.equal(value, wanted)


def test_a_label_that_is_no_word_makes_the_loss_nan():
    hidden, weight, labels = make_inputs(300, 1000, 64)
    labels[5] = 1000
    assert linear_cross_entropy(hidden, weight, labels, backend="triton").isnan()
