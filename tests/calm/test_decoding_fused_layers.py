"""Which layers of a backbone run as fused kernels: those that are their weights alone."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from calm.decoding.engine.fused_layers import are_fused, is_plain, is_plain_mlp
from calm.models.backbone import Backbone


def make_layer(**fields):
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=8, **fields,
    )  # fmt: skip
    return Backbone(config).layers[0]


class Adapter(nn.Linear):
    """A linear layer that might add something to its weight."""


def replace_linear(layer):
    layer.self_attn.v_proj = Adapter(16, 16, bias=False)


def replace_forward(layer):
    layer.mlp.act_fn.forward = torch.relu


def replace_activation(layer):
    layer.mlp.act_fn = nn.GELU()


class Quantised(torch.Tensor):
    """Stands for tensors whose elements are not where a kernel would read them."""


class OffsetNorm(LlamaRMSNorm):
    """A class below Llama's, whose factor is 1 + w."""

    def forward(self, hidden):
        return super().forward(hidden) * (1 + 1 / self.weight)


def replace_norm(layer):
    layer.input_layernorm = OffsetNorm(len(layer.input_layernorm.weight))


def quantise(layer):
    weight = layer.mlp.up_proj.weight.detach().as_subclass(Quantised)
    layer.mlp.up_proj.weight = nn.Parameter(weight)


CHANGES = {
    "hook": lambda layer: layer.self_attn.o_proj.register_forward_hook(lambda *_: None),
    "hook before": lambda layer: layer.input_layernorm.register_forward_pre_hook(lambda *_: None),
    "hook of the MLP": lambda layer: layer.mlp.register_forward_hook(lambda *_: None),
    "adapter": replace_linear,
    "another forward": replace_forward,
    "another activation": replace_activation,
    "another norm": replace_norm,
    "quantised weight": quantise,
    "two dtypes": lambda layer: layer.mlp.down_proj.double(),
    "norm in another dtype": lambda layer: layer.input_layernorm.double(),
    "attention in another dtype": lambda layer: (
        layer.self_attn.double(), layer.input_layernorm.double()
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_layer_is_not_plain(name):
    layer = make_layer()
    assert is_plain(layer)
    CHANGES[name](layer)
    assert not is_plain(layer)


@pytest.mark.parametrize(
    "fields", [{"attention_bias": True}, {"mlp_bias": True}, {"hidden_act": "gelu"}], ids=str
)
def test_nor_is_a_layer_with_biases_or_another_activation(fields):
    layer = make_layer(**fields)
    assert not is_plain(layer)
    is_mlp = is_plain_mlp(layer.post_attention_layernorm, layer.mlp)
    assert is_mlp is ("attention_bias" in fields)


@torch.no_grad()
def test_nothing_is_fused_where_torch_is_the_backend():
    assert not are_fused(torch.zeros(2, 16))
