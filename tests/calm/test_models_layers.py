"""Layers of the models are those of torch and transformers; decoding's twins share the rest."""

import gc
import threading
import weakref

import pytest
import torch
from tiny_models import tiny_baseline, tiny_calm
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from calm import AutoencoderConfig
from calm.decoding.engine.layout import by_columns
from calm.layers import FeedForward, Linear, RMSNorm
from calm_kernels import products


def config(**fields):
    return AutoencoderConfig(vocab_size=11, hidden_size=48, intermediate_size=80, **fields)


@pytest.mark.parametrize("fields", [{}, {"mlp_bias": True}, {"hidden_act": "gelu"}], ids=str)
def test_feed_forward_is_that_of_transformers(fields):
    ours, theirs = FeedForward(config(**fields)), LlamaMLP(config(**fields))
    theirs.load_state_dict(ours.state_dict())
    hidden = torch.randn(3, 700, 48)  # enough for oneDNN
    torch.testing.assert_close(ours(hidden), theirs(hidden))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_is_that_of_transformers(dtype, weight_dtype):
    ours, theirs = RMSNorm(48, eps=1e-6), LlamaRMSNorm(48, eps=1e-6)
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    hidden = torch.randn(5, 48).to(dtype)
    actual, expected = ours.to(weight_dtype)(hidden), theirs.to(weight_dtype)(hidden)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected)


def test_every_product_is_ours():
    for model in (tiny_calm(), tiny_calm("diffusion"), tiny_baseline()):
        others = {
            name for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and not isinstance(module, Linear)
        }  # fmt: skip
        # The energy head's module only holds parameters; `energy_head` multiplies.
        assert all(name.startswith("mlp_generator") for name in others)


def test_a_twin_by_columns_leaves_the_model_alone(monkeypatch):
    monkeypatch.setattr(products, "MIN_MULTIPLICATIONS", 40 * 32)
    monkeypatch.setattr(products, "MIN_SHARED", 40 * 32)
    model = tiny_calm()
    twin = by_columns(model, model.transformer, model.ae_model.encoder)
    assert twin.transformer is model.transformer
    assert twin.ae_model.decoder.output_weight is model.ae_model.decoder.output_weight
    layouts = set()
    for name, weight in twin.named_parameters():
        original = model.get_parameter(name)
        assert torch.equal(weight, original) and original.is_contiguous()
        is_other = weight.dim() == 2 and weight.numel() < 40 * 32
        is_left = name.startswith(("transformer", "ae_model.encoder"))
        if is_other and not is_left and 1 not in weight.shape:
            assert weight is not original and weight.T.is_contiguous()
        layouts.add(weight is original)
        assert (is_other and not is_left) or weight is original
    assert layouts == {True, False}


@pytest.mark.parametrize("make_model", [tiny_calm, tiny_baseline])
def test_decoding_reads_the_twin(make_model):
    model = make_model()
    ids = torch.randint(3, (1, 8), generator=torch.Generator().manual_seed(0))
    expected = model.generate(ids, max_new_tokens=24, seed=0)
    own = {id(weight) for weight in model.parameters()}
    copies = model._kept_for_decoding.arranged.twin.parameters()
    for weight in (weight for weight in copies if id(weight) not in own):
        weight.data.neg_()
    assert not torch.equal(model.generate(ids, max_new_tokens=24, seed=0), expected)


class Adapter(nn.Module):
    """A product with a switch, as adapters have one."""

    def __init__(self, product):
        super().__init__()
        self.product, self.is_on = product, True

    def forward(self, inputs):
        return self.product(inputs) * (-1.0 if self.is_on else 1.0)


def test_hooks_adapters_and_patches_are_not_missed():
    model = tiny_calm()
    model.lock = threading.Lock()  # which cannot be copied
    model.embed_proj[0] = Adapter(model.embed_proj[0])
    ids = torch.randint(5, (1, 8), generator=torch.Generator().manual_seed(0))
    before = model.generate(ids, max_new_tokens=24, seed=0)
    hooked, patched = [], []
    model.embed_proj[2].register_forward_hook(lambda *_: hooked.append(1))
    model.embed_proj[0].is_on = False
    after = model.generate(ids, max_new_tokens=24, seed=0)
    assert hooked and not torch.equal(after, before)
    plain = model.ae_model.decoder.expand
    model.ae_model.decoder.expand = lambda latents: patched.append(1) or plain(latents)
    assert torch.equal(model.generate(ids, max_new_tokens=24, seed=0), after) and patched


def test_a_model_that_generated_is_freed_and_its_twin():
    model = tiny_calm()
    model.generate(torch.zeros(1, 8, dtype=torch.int64), max_new_tokens=4, seed=0)
    alive = [weakref.ref(model), weakref.ref(model._kept_for_decoding.arranged.twin)]
    gc.disable()
    try:
        del model
        assert [reference() for reference in alive] == [None, None]
    finally:
        gc.enable()


def test_elsewhere_nothing_is_copied():
    model = tiny_calm().to("meta")
    assert by_columns(model, model.transformer) is model
