"""Memory by formula against what autograd and the kernels save."""

import dataclasses

import pytest
import tiny
import torch
from tiny_models import tiny_baseline, tiny_calm

from calm.plan import Run, described, stages_of
from calm.training.flags.recipe import Stage, recipe_names
from calm.training_memory import memory_of

RUN = Run(
    block_size=40, micro_batch=3, accumulation=1, steps=None, is_bf16=True, is_checkpointed=False
)
POSITIONS = 3 * 40


CHECKPOINTED = dataclasses.replace(RUN, is_checkpointed=True)


def saved_bytes(model, forward):
    """What autograd keeps of ``forward()`` under autocast, weights aside."""
    shapes = {tuple(w.shape) for w in model.parameters()}
    shapes |= {tuple(reversed(shape)) for shape in shapes}
    found = {}

    def keep(tensor):
        if tuple(tensor.shape) not in shapes:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive: no address returns
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        result = forward()  # its graph lives as long
    return sum(size for size, _ in found.values()) if result is not None else 0


def backbone_bytes(model):
    inputs = torch.randn(3, 40, model.config.hidden_size, requires_grad=True)
    return saved_bytes(model, lambda: model.model(inputs_embeds=inputs, use_cache=False))


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize(("width", "inner"), [(64, 160), (96, 144)])
def test_a_layer_of_the_backbone(width, inner, heads):
    """A CPU's norm keeps one float32 array more than a GPU's."""
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_key_value_heads": heads}
    pair = [tiny_baseline(num_hidden_layers=layers, **sizes).train() for layers in (2, 3)]
    saved = [backbone_bytes(model) for model in pair]
    formula = [memory_of(model, RUN, 1).activations for model in pair]
    layer = saved[1] - saved[0] - 2 * 4 * width * POSITIONS
    assert formula[1] - formula[0] == pytest.approx(layer, rel=0.02)


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing_enable")  # no name fits all versions
def test_checkpointing_keeps_the_inputs_of_layers():
    pair = [tiny_baseline(num_hidden_layers=layers).train() for layers in (2, 3)]
    for model in pair:
        model.gradient_checkpointing_enable()
    saved = [backbone_bytes(model) for model in pair]
    formula = [memory_of(model, CHECKPOINTED, 1).activations for model in pair]
    assert formula[1] - formula[0] == saved[1] - saved[0] == POSITIONS * 4 * 32


@pytest.mark.parametrize("flag", ["gradient_checkpointing", "activation_checkpointing"])
def test_both_names_of_the_flag_are_read(flag):
    runs = [described(Stage.BASELINE, {flag: value})[1] for value in ("true", "false")]
    assert [run.is_checkpointed for run in runs] == [True, False]


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_the_energy_head_as_its_kernels_save_it(blocks, recompute):
    """And what one block and the last layer compute again."""
    pytest.importorskip("triton")
    from calm_kernels.energy_head.function import _SAVE_ALL, _SAVE_STREAMS, _forward_op
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
    hidden = torch.zeros(30, 32, device="meta", dtype=torch.bfloat16)
    seed = torch.zeros(2, device="meta").long()
    _, saved = _forward_op(
        hidden, None, parameters, seed, None, 0, 5, 1.0,
        _SAVE_STREAMS if recompute else _SAVE_ALL,
    )  # fmt: skip
    again = 30 * 5 * 2 * (4 + 1) * 32 if recompute else 0
    latents = 30 * 5 * 2 * 4 * 8  # float32, with their gradients
    by_kernels = sum(tensor.nbytes for tensor in saved) + latents + again
    pair = [tiny_calm(num_samples=draws) for draws in (5, 10)]
    for model in pair:
        model.config.num_mlp_layers, model.config.head_recompute = blocks, recompute
    sizes = [memory_of(model, RUN, 1).activations for model in pair]
    once = 30 * 2 * (blocks + 1) * 32
    assert sizes[1] - sizes[0] == by_kernels - once


def test_float32_takes_more_and_has_no_copies():
    model = tiny_calm()
    half, full = (
        memory_of(model, RUN, 1),
        memory_of(model, dataclasses.replace(RUN, is_bf16=False), 1),
    )
    assert full.copies == 0 < half.copies and full.activations > half.activations
    assert full.weights == half.weights == 4 * sum(w.numel() for w in model.parameters())
    trained = sum(w.numel() for w in model.parameters() if w.requires_grad)
    assert half.gradients == half.optimizer / 2 == 4 * trained
    assert half.total() == sum(vars(half).values())


@pytest.mark.parametrize(
    ("head", "again"),
    [("energy", 8), ("diffusion", 0), ("diffusion", 20), ("flow", 0), ("flow", 20)],
)
def test_what_a_draw_adds_to_a_whole_model(head, again):
    """Within 20 %. `again`: bytes a feature of what a block computes again, not saved here.

    A CPU's energy head saves inputs and outputs of SiLU, of which kernels compute one again: it is
    compared where a block saves its input alone.
    """
    fields = {"hidden_size": 64, "num_mlp_layers": 3, "head_recompute": again > 0}
    pair = [tiny.model(head, num_samples=draws, **fields).train() for draws in (4, 8)]
    ids, run = tiny.tokens(batch=3, chunks=11), dataclasses.replace(RUN, block_size=40)
    saved = [saved_bytes(model, lambda m=model: m(ids, labels=ids, seed=1).loss) for model in pair]
    formula = [memory_of(model, run, 1).activations for model in pair]
    added = formula[1] - formula[0] - 4 * 30 * again * 64
    assert added == pytest.approx(saved[1] - saved[0], rel=0.2)


@pytest.mark.parametrize(
    ("term", "kind"),
    [
        ("token_loss_weight", "independent"),
        ("token_loss_weight", "causal"),
        ("token_score_weight", "independent"),
    ],
)
def test_training_terms(term, kind):
    """Within 20 %, of what autograd saves; gradients that exist in the backward pass alone aside.

    A CPU keeps the gradient of a readout's slots in bfloat16; that of the embedding is a weight's.
    Its norm keeps one float32 array more than a GPU's.
    """
    pair = [
        tiny.model(hidden_size=64, **fields).train()
        for fields in ({}, {term: 1.0, "token_readout": kind})
    ]
    ids, run = tiny.tokens(batch=3, chunks=11), dataclasses.replace(RUN, block_size=40)
    saved = [saved_bytes(model, lambda m=model: m(ids, labels=ids, seed=1).loss) for model in pair]
    formula = [memory_of(model, run, 1).activations for model in pair]
    slots, vocabulary = 30 * 4, tiny.VOCAB
    backward = {
        "token_loss_weight": 4 * 64 * (slots + vocabulary),
        "token_score_weight": 2 * slots * vocabulary * (2 + 4),
    }
    added = formula[1] - formula[0] - backward[term] + (kind == "causal") * 4 * 64 * slots
    assert added == pytest.approx(saved[1] - saved[0], rel=0.2)


def test_every_published_recipe_but_the_largest_fits_80_gb():
    unfit = set()
    for name in recipe_names():
        for model, run in stages_of(name).values():
            if not memory_of(model, run, 8).fits():
                unfit.add(name)
    assert unfit == {"baseline-10b", "calm-10b"}


def test_shards_make_the_largest_fit_eight_gpus():
    """16 bytes a weight are divided; an autoencoder that is frozen stays whole."""
    for name in ("baseline-10b", "calm-10b"):
        for model, run in stages_of(name).values():
            few, many = (memory_of(model, run, gpus, is_sharded=True) for gpus in (8, 64))
            assert few.fits() and few.buckets == few.copies == 0
            assert few.gathered == many.gathered > 0 and few.activations == many.activations
            frozen = sum(w.numel() for w in model.parameters() if not w.requires_grad)
            trained = sum(w.numel() for w in model.parameters()) - frozen
            for memory, gpus in ((few, 8), (many, 64)):
                states = memory.weights - 4 * frozen + memory.gradients + memory.optimizer
                assert states == pytest.approx(16 * trained / gpus, abs=64)


def test_several_gpus_exchange_gradients_in_buckets():
    alone, together = (memory_of(tiny_calm(), RUN, gpus) for gpus in (1, 8))
    assert alone.buckets == 0 and together.buckets == together.gradients
    assert together.total() - alone.total() == together.gradients
