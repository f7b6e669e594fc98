"""Memory by formula against what autograd and the kernels save."""

import dataclasses

import pytest
import torch
from tiny_models import tiny_baseline, tiny_calm

from calm.plan import Run
from calm.training_memory import memory_of

RUN = Run(
    block_size=40, micro_batch=3, accumulation=1, steps=None, is_bf16=True, is_checkpointed=False
)
POSITIONS = 3 * 40


def saved_bytes(model):
    """What autograd keeps of the backbone's forward under autocast, weights aside."""
    shapes = {tuple(w.shape) for w in model.parameters()}
    shapes |= {tuple(reversed(shape)) for shape in shapes}
    found = {}

    def keep(tensor):
        if tuple(tensor.shape) not in shapes:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive: no address returns
        return tensor

    inputs = torch.randn(3, 40, model.config.hidden_size, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        model.model(inputs_embeds=inputs, use_cache=False)
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize(("width", "inner"), [(64, 160), (96, 144)])
def test_a_layer_of_the_backbone(width, inner, heads):
    """A CPU's norm keeps one float32 array more than a GPU's."""
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_key_value_heads": heads}
    pair = [tiny_baseline(num_hidden_layers=layers, **sizes).train() for layers in (2, 3)]
    saved = [saved_bytes(model) for model in pair]
    formula = [memory_of(model, RUN).activations for model in pair]
    layer = saved[1] - saved[0] - 2 * 4 * width * POSITIONS
    assert formula[1] - formula[0] == pytest.approx(layer, rel=0.02)


def test_checkpointing_keeps_the_inputs_of_layers():
    pair = [tiny_baseline(num_hidden_layers=layers) for layers in (2, 3)]
    run = dataclasses.replace(RUN, is_checkpointed=True)
    sizes = [memory_of(model, run).activations for model in pair]
    assert sizes[1] - sizes[0] == POSITIONS * 4 * 32


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_energy_head_as_its_kernels_save_it(blocks):
    pytest.importorskip("triton")
    from calm_kernels.energy_head.function import _SAVE_ALL, _forward_op
    from calm_kernels.energy_head.parameters import (
        flatten_parameters,
        gather_parameters,
        parameters_by_name,
    )

    torch.manual_seed(0)
    model = tiny_calm(num_samples=5)
    model.config.num_mlp_layers = blocks
    head = type(model.generative_head)(model.config).to("meta")
    parameters = flatten_parameters(gather_parameters(parameters_by_name(head)))
    hidden, seed = torch.zeros(30, 32, device="meta"), torch.zeros(2, device="meta").long()
    _, saved = _forward_op(
        hidden, None, parameters, seed, seed[0], 5, 1.0, torch.bfloat16, _SAVE_ALL
    )
    latents = 30 * 5 * 2 * 4 * 8  # float32, with their gradients
    by_kernels = sum(tensor.nbytes for tensor in saved) + latents
    pair = [tiny_calm(num_samples=draws) for draws in (5, 10)]
    for model in pair:
        model.config.num_mlp_layers = blocks
    sizes = [memory_of(model, RUN).activations for model in pair]
    once = 30 * 2 * (blocks + 1) * 32
    assert sizes[1] - sizes[0] == by_kernels - once


def test_float32_takes_more_and_has_no_copies():
    model = tiny_calm()
    half, full = memory_of(model, RUN), memory_of(model, dataclasses.replace(RUN, is_bf16=False))
    assert full.copies == 0 < half.copies and full.activations > half.activations
    assert full.weights == half.weights == 4 * sum(w.numel() for w in model.parameters())
    trained = sum(w.numel() for w in model.parameters() if w.requires_grad)
    assert half.gradients == half.optimizer / 2 == 4 * trained
    assert half.total() == sum(vars(half).values())
