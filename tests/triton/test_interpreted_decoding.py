"""A step of decoding in fixed shapes, as a GPU runs it: which kernels, and the torch backend's
text.
"""

from importlib import import_module

import pytest
import torch
from model_cases import Launches, tiny_model
from transformers import LlamaConfig

from calm import BaselineTransformer
from calm.decoding.engine.decode_step import DecodeState, decode_step, prefill
from calm.decoding.engine.predictors import ChunkPredictor, TokenPredictor
from calm.decoding.sampling.methods import Batch, Direct
from calm_kernels import use_backend
from calm_kernels.agreeing_patch import kernels as vote_kernels
from calm_kernels.chunk_record import kernels as record_kernels
from calm_kernels.decode_attention import kernels as attention_kernels
from calm_kernels.energy_head import embedding_kernels, norm_kernels, small_rows_kernels
from calm_kernels.linear_argmax import kernels as argmax_kernels
from calm_kernels.norm_linear import kernels as layer_kernels
from calm_kernels.softmax_draws import kernels as token_kernels

MLP = ["norm_swiglu_kernel", "linear_residual_kernel"]
LAYER = ["norm_linear_kernel", "attention_kernel", "linear_residual_kernel", *MLP]
HEAD = ["embed_layer_kernel", "embedding_norms_kernel", "silu_layer_kernel", "silu_layer_kernel",
        "swiglu_layer_kernel", "residual_layer_kernel", "silu_layer_kernel"]  # fmt: skip
CALM = [*LAYER, *HEAD, *MLP * 2, "partial_kernel", "reduce_kernel"]
VOTE, RECORD = ["count_kernel", "choose_kernel"], ["record_kernel", "advance_kernel"]
METHODS = {
    "direct": (Direct(), [*CALM, *RECORD]),
    "batch": (Batch(temperature=0.5, num_samples=9, is_slotwise=False), [*CALM, *VOTE, *RECORD]),
}
KERNELS = (
    embedding_kernels, norm_kernels, small_rows_kernels, argmax_kernels, vote_kernels,
    layer_kernels, attention_kernels, record_kernels, token_kernels,
)  # fmt: skip


@torch.no_grad()
def decode(predictor, backend, *, is_fixed=False):
    """Tokens and how they were found, ``[2, B, K + 5]``; the second prompt is shorter."""
    state = DecodeState.allocate(predictor, batch_size=2, capacity=8, is_fixed=is_fixed)
    size = predictor.patch_size
    prompt = torch.randint(64, (2, 3 * size), generator=torch.Generator().manual_seed(1))
    with use_backend(backend):
        prefill(state, prompt, [3, 2], torch.tensor([[3, 0], [4, 0]]))
        state.tokens.copy_(prompt[:, -size:])
        return torch.stack([decode_step(state) for _ in range(2)])


@pytest.mark.parametrize(
    ("name", "is_fixed"), [("direct", False), ("direct", True), ("batch", True)]
)
def test_a_step_is_that_of_torch(name, is_fixed, monkeypatch):
    method, kernels = METHODS[name]
    predictor = ChunkPredictor(tiny_model().eval(), method)
    expected = decode(predictor, "torch", is_fixed=is_fixed)
    launches = Launches(monkeypatch, *KERNELS)
    actual = decode(predictor, "auto", is_fixed=is_fixed)
    assert launches.names == kernels * len(actual)
    assert torch.equal(actual, expected)
    assert len(actual[..., :2].unique()) > 2  # not one token again and again


def test_a_step_of_the_baseline_is_that_of_torch(monkeypatch):
    """Through the same kernels of the backbone; four heads share two keys."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    predictor = TokenPredictor(BaselineTransformer(config).eval(), 1.0)
    expected = decode(predictor, "torch")
    launches = Launches(monkeypatch, *KERNELS)
    actual = decode(predictor, "auto")
    assert launches.names == [*LAYER * 2, "split_kernel", "draw_kernel", *RECORD] * len(actual)
    assert torch.equal(actual, expected)
    assert len(actual[..., 0].unique()) > 2


def test_every_kernel_of_a_step_can_overlap():
    """tests/kernels/test_overlap.py compiles those that can, and proves that they wait first."""
    kernels = {name: found for module in KERNELS for name, found in vars(module).items()}
    step = {*CALM, *VOTE, *RECORD, "split_kernel", "draw_kernel"}
    assert [name for name in step if "OVERLAP" not in kernels[name].arg_names] == []


@pytest.mark.parametrize(("kv_heads", "splits"), [(1, {4, 2, 1}), (3, {1}), (5, {1})])
def test_warmup_splits_the_cache_as_any_batch_does(kv_heads, splits, monkeypatch):
    """On four processors: 1, 2 and 4 sequences of one key head; more heads than processors."""
    seen, warmup = [], import_module("calm_kernels.warmup")
    monkeypatch.setattr(warmup, "CAPACITY", 256)
    monkeypatch.setattr(warmup, "decode_attention", lambda _, keys, *__: seen.append(keys.shape))
    config = LlamaConfig(
        hidden_size=8 * kv_heads, num_attention_heads=kv_heads, num_key_value_heads=kv_heads
    )
    warmup._decode_attention(config, torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    found = {attention_kernels.num_splits(batch * heads, 256, 4, 64) for batch, heads, *_ in seen}
    assert found == splits


def test_a_layer_that_is_more_than_its_weights_runs_as_it_is(monkeypatch):
    """Every call of a module with a hook reaches the hook."""
    model, calls = tiny_model().eval(), []
    model.transformer.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    predictor = ChunkPredictor(model, Direct())
    launches = Launches(monkeypatch, layer_kernels, attention_kernels)
    decode(predictor, "auto")
    assert len(calls) == 3 and launches.names == MLP * 2 * 2  # prefill, two steps; the decoder
