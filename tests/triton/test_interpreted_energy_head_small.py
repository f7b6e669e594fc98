"""The head's fused layers: few rows without gradients, against the formula and the other path."""

import pytest
import torch
from head_cases import make_head, make_inputs, size_id
from helpers import assert_no_worse_than_plain, relative_error
from model_cases import Launches

from calm_kernels import energy_head, tuning
from calm_kernels.energy_head import (
    activation_kernels,
    embedding_kernels,
    norm_kernels,
    small_rows_kernels,
)

# width, latent, noise, blocks, draws, rows: one row and tiles with rows or features missing
SIZES = [
    (16, 4, 3, 1, 1, (1,)),
    (48, 5, 7, 2, 5, ()),
    (96, 8, 64, 3, 17, (1,)),
    (112, 16, 9, 1, 10, (7,)),
    (80, 7, 5, 1, 1, (2, 9)),
    (144, 5, 7, 1, 90, (3,)),
]


@pytest.fixture
def launches(monkeypatch):
    """Kernels of either path."""
    modules = (activation_kernels, embedding_kernels, norm_kernels, small_rows_kernels)
    return Launches(monkeypatch, *modules)


def cast(head, dtype):
    """A copy of the head without gradients."""
    return {name: value.detach().to(dtype) for name, value in head.named_parameters()}


def sample(head, inputs, dtype, backend):
    """Latents for given noise."""
    return energy_head(*(value.to(dtype) for value in inputs), cast(head, dtype), backend=backend)


def assert_fused(launches):
    assert "silu_layer_kernel" in launches.names and "silu_kernel" not in launches.names


@pytest.mark.parametrize("size", SIZES, ids=size_id)
def test_as_good_as_the_formula(size, generator, launches):
    head, inputs = make_head(size, generator), make_inputs(size, generator)
    truth = sample(head, inputs, torch.float64, "reference")
    plain = sample(head, inputs, torch.float32, "reference")
    actual = sample(head, inputs, torch.float32, "triton")
    assert_fused(launches)
    assert_no_worse_than_plain([actual], [plain], [truth])


@pytest.mark.parametrize("size", SIZES[1:4], ids=size_id)
def test_drawn_noise_is_that_of_the_path_with_gradients(size, generator, launches):
    head = make_head(size, generator).float()
    hidden = make_inputs(size, generator)[0].float()
    options = {"num_samples": size[4], "seed": 7, "first_row": 3, "noise_scale": 0.8}
    expected = head.sample(hidden, backend="triton", **options)
    assert expected.requires_grad and "silu_layer_kernel" not in launches.names
    launches.names.clear()
    with torch.no_grad():
        actual = head.sample(hidden, backend="triton", **options)
    assert_fused(launches)
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_row_does_not_depend_on_the_others(generator):
    """Each with a seed of its own, within one block of rows and beyond."""
    size = (48, 4, 5, 2, 3, (9,))
    head = make_head(size, generator).float()
    hidden = make_inputs(size, generator)[0].float()
    seeds = torch.stack([torch.arange(100, 109), torch.arange(9) % 4], dim=1)
    together = head.sample(hidden, num_samples=3, seed=seeds, backend="triton")
    order = torch.tensor([8, 0, 3])
    alone = head.sample(hidden[order], num_samples=3, seed=seeds[order], backend="triton")
    torch.testing.assert_close(alone, together[:, order])


def test_a_stream_far_from_zero(generator):
    """Statistics come from centred parts: a mean of 1000 deviations costs no digits beyond those
    that the stream has lost.
    """
    size = (96, 6, 8, 2, 5, (4,))
    head, inputs = make_head(size, generator), make_inputs(size, generator)
    for block in head.mlp_blocks:
        block.down_proj.bias.data += 1000.0
    truth = sample(head, inputs, torch.float64, "reference")
    plain = sample(head, inputs, torch.float32, "reference")
    assert_no_worse_than_plain([sample(head, inputs, torch.float32, "triton")], [plain], [truth])


@torch.no_grad()
def test_autocast_keeps_the_residual_stream_in_float32(generator, launches):
    """In float16: the interpreter cuts bfloat16 off instead of rounding it."""
    size = (48, 6, 8, 3, 2, (7,))
    head, inputs = make_head(size, generator), make_inputs(size, generator)
    truth = sample(head, inputs, torch.float64, "reference")
    with torch.autocast("cpu", dtype=torch.float16):
        plain = sample(head, inputs, torch.float32, "reference")
        actual = sample(head, inputs, torch.float32, "triton")
    assert_fused(launches)
    assert actual.dtype == torch.float16
    assert_no_worse_than_plain([actual], [plain], [truth])


def test_bfloat16(generator):
    size = (48, 6, 8, 3, 2, (7,))
    head, inputs = make_head(size, generator), make_inputs(size, generator)
    actual = sample(head, inputs, torch.bfloat16, "triton")
    assert actual.dtype == torch.bfloat16
    assert relative_error(actual, sample(head, inputs, torch.float64, "reference")) < 0.05


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_launches(num_blocks, generator, launches):
    """Four a block; the library's matmul is the last."""
    size = (16, 4, 3, num_blocks, 2, (2,))
    head, inputs = make_head(size, generator), make_inputs(size, generator)
    with torch.autograd.profiler.profile() as profile:
        sample(head, inputs, torch.float32, "triton")
    block = [*["silu_layer_kernel"] * 2, "swiglu_layer_kernel", "residual_layer_kernel"]
    expected = [
        "embed_layer_kernel",
        "embedding_norms_kernel",
        *block * num_blocks,
        "silu_layer_kernel",
    ]
    assert launches.names == expected
    matmuls = [event.name for event in profile.function_events]
    assert matmuls.count("aten::mm") + matmuls.count("aten::addmm") == 1


def test_many_rows_and_other_widths_take_the_library(generator, launches, monkeypatch):
    monkeypatch.setattr(tuning, "FUSED_HEAD_ROWS", 8)
    for size, is_fused in (
        ((16, 4, 3, 1, 4, (2,)), True),
        ((16, 4, 3, 1, 3, (3,)), False),
        ((24, 4, 3, 1, 2, (2,)), False),
    ):
        launches.names.clear()
        sample(make_head(size, generator), make_inputs(size, generator), torch.float32, "triton")
        assert ("silu_layer_kernel" in launches.names) is is_fused
    assert tuning.fuses_head(1, 4096) and not tuning.fuses_head(0, 1024)
    monkeypatch.undo()
    assert tuning.fuses_head(1024, 1024) and not tuning.fuses_head(1024, 2560)
