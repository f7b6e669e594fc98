"""The attention around its kernel; it writes the cache in place and so is no custom operator."""

import torch
from torch import Tensor

from calm_kernels.decode_attention.kernels import launch_attention

__all__ = ["decode_attention_triton"]


def decode_attention_triton(
    query_key_value: Tensor,  # [B, (heads + 2 kv_heads) D]
    keys: Tensor,  # [B, kv_heads, capacity, D]
    values: Tensor,
    rotations: Tensor,  # [capacity, D/2] complex
    lengths: Tensor,  # [B]
    arrivals: Tensor,  # zeros [B kv_heads]
) -> Tensor:
    """Attended values, ``[B, heads D]``; see `calm_kernels.decode_attention`."""
    batch, kv_heads, _, size = keys.shape
    width = query_key_value.shape[1] - 2 * kv_heads * size
    out = query_key_value.new_empty(batch, width)
    if batch:
        with torch.cuda.device_of(keys):
            launch_attention(
                query_key_value, keys, values, torch.view_as_real(rotations), lengths, arrivals,
                out,
            )  # fmt: skip
    return out
