"""The norm is that of transformers; decoding runs the model's own modules."""

import gc
import threading
import weakref

import pytest
import torch
from tiny_models import tiny_calm
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from calm.norm import RMSNorm


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_under_autocast(dtype):
    """Sums in float32, rounded once to the dtype that the layers behind it multiply in."""
    norm = RMSNorm(48, eps=1e-6)
    nn.init.normal_(norm.weight)
    hidden = torch.randn(5, 48).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        actual = norm(hidden)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, norm(hidden.float()).bfloat16())
    actual.sum().backward()
    assert hidden.grad.dtype == dtype and norm.weight.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert norm.double()(hidden.double()).dtype == torch.float64


class Adapter(nn.Module):
    """A linear layer with a switch, as adapters have one."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.is_on = linear, True

    def forward(self, inputs):
        return self.linear(inputs) * (-1.0 if self.is_on else 1.0)


def test_hooks_adapters_and_patches_are_not_missed():
    model = tiny_calm()
    model.lock = threading.Lock()  # which cannot be copied
    model.embed_proj[0] = Adapter(model.embed_proj[0])
    attention = model.transformer.layers[0].self_attn
    attention.q_proj = Adapter(attention.q_proj)
    ids = torch.randint(5, (1, 8), generator=torch.Generator().manual_seed(0))
    before = model.generate(ids, max_new_tokens=24, seed=0)
    hooked, patched = [], []
    model.embed_proj[2].register_forward_hook(lambda *_: hooked.append(1))
    model.embed_proj[0].is_on = attention.q_proj.is_on = False
    after = model.generate(ids, max_new_tokens=24, seed=0)
    assert hooked and not torch.equal(after, before)
    plain = model.ae_model.decoder.expand
    model.ae_model.decoder.expand = lambda latents: patched.append(1) or plain(latents)
    assert torch.equal(model.generate(ids, max_new_tokens=24, seed=0), after) and patched


def test_a_model_that_generated_is_freed():
    model = tiny_calm()
    model.generate(torch.zeros(1, 8, dtype=torch.int64), max_new_tokens=4, seed=0)
    alive = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()
