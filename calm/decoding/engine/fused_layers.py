"""A layer of the backbone as five launches, for the few rows of a decode step.

`fused_layer` computes what a `LlamaDecoderLayer` computes, from the layer's own weights, with the
kernels of `calm_kernels` where they are chosen. A layer that is more than its weights (biases,
hooks, adapters, another activation) is not plain and runs module by module.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from calm.decoding.engine.kv_cache import KVCache
from calm.norm import RMSNorm
from calm_kernels import decode_attention, linear_residual, norm_linear, norm_swiglu
from calm_kernels.autograd import is_autocast_on
from calm_kernels.backend import Backend, resolve
from calm_kernels.tuning import fuses_layers

__all__ = ["are_fused", "fused_layer", "fused_mlp", "is_plain", "is_plain_mlp"]


def is_plain(layer: nn.Module) -> bool:
    """Whether a Llama layer is its norms and weights, all of one dtype, and nothing else."""
    parts = cast(Any, layer)
    attention = parts.self_attn
    linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return (
        type(attention) is LlamaAttention
        and _are_plain(parts.input_layernorm, *linears)
        and is_plain_mlp(parts.post_attention_layernorm, parts.mlp)
        and parts.input_layernorm.weight.dtype == parts.mlp.up_proj.weight.dtype
    )


def is_plain_mlp(norm: nn.Module, mlp: nn.Module) -> bool:
    """The same of a Llama MLP and the norm before it."""
    parts = cast(Any, mlp)
    return (
        type(mlp) is LlamaMLP
        and type(parts.act_fn) is type(ACT2FN["silu"])
        and _are_plain(norm, parts.gate_proj, parts.up_proj, parts.down_proj)
        and not _is_changed(mlp)
        and not _is_changed(parts.act_fn)
    )


def _are_plain(norm: nn.Module, *linears: nn.Module) -> bool:
    weights = [cast(Tensor, module.weight) for module in (norm, *linears)]
    return (
        type(norm) in (LlamaRMSNorm, RMSNorm)  # a class below them may compute something else
        and all(type(weight) in (Tensor, nn.Parameter) for weight in weights)  # not quantised
        and all(type(linear) is nn.Linear and linear.bias is None for linear in linears)
        and len({weight.dtype for weight in weights}) == 1
        and not any(_is_changed(module) for module in (norm, *linears))
    )


def _is_changed(module: nn.Module) -> bool:
    """Whether a call of the module is more than its class says."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def are_fused(hidden: Tensor) -> bool:
    """Whether plain layers run fused on ``[..., H]``: with kernels, and for few rows."""
    return (
        not torch.is_grad_enabled()
        and fuses_layers(hidden.numel() // hidden.shape[-1])
        and hidden.dtype in (torch.float32, torch.bfloat16)
        and not is_autocast_on(hidden.device.type)
        and resolve(Backend.AUTO, "decode_attention", hidden) is Backend.TRITON
    )


def fused_layer(
    layer: nn.Module, hidden: Tensor, keys: Tensor, values: Tensor, cache: KVCache
) -> Tensor:
    """The layer on ``[B, H]``, whose keys and values go to the next column of the cache."""
    parts = cast(Any, layer)
    attention, norm = parts.self_attn, parts.input_layernorm
    weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    rows = norm_linear(hidden, norm.weight, weights, norm_eps=norm.variance_epsilon)
    attended = decode_attention(
        rows, keys, values, cache.rotations, cache.lengths, arrivals=cache.arrivals
    )
    hidden = linear_residual(attended, attention.o_proj.weight, hidden)
    return fused_mlp(parts.post_attention_layernorm, parts.mlp, hidden)


def fused_mlp(norm: nn.Module, mlp: nn.Module, hidden: Tensor) -> Tensor:
    """The sum x + MLP(norm(x)) of x ``[..., H]``, in two launches."""
    parts, weight = cast(Any, mlp), cast(Tensor, norm.weight)
    features = norm_swiglu(
        hidden, weight, parts.gate_proj.weight, parts.up_proj.weight,
        norm_eps=cast(Any, norm).variance_epsilon,
    )  # fmt: skip
    return linear_residual(features, parts.down_proj.weight, hidden)
