"""The torch backend: torch's own attention, which reads all columns and masks later ones."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["decode_attention_eager"]


def decode_attention_eager(
    query_key_value: Tensor,  # [B, (heads + 2 kv_heads) D]
    keys: Tensor,  # [B, kv_heads, capacity, D]
    values: Tensor,
    rotations: Tensor,  # [capacity, D/2] complex
    lengths: Tensor,  # [B]
) -> Tensor:
    """Attended values, ``[B, heads D]``; see `calm_kernels.decode_attention`."""
    (_, kv_heads, capacity, size), device = keys.shape, keys.device
    rows = query_key_value.unflatten(1, (-1, size))
    num_heads = rows.shape[1] - 2 * kv_heads
    turned, value = rows.split((num_heads + kv_heads, kv_heads), dim=1)
    real, imaginary = turned.to(rotations.real.dtype).chunk(2, dim=-1)
    product = torch.complex(real, imaginary) * rotations[lengths][:, None]
    turned = torch.cat([product.real, product.imag], dim=-1).to(rows.dtype)
    query, key = turned.split((num_heads, kv_heads), dim=1)
    place = lengths[:, None, None, None].expand(-1, kv_heads, 1, size)
    keys.scatter_(2, place, key[:, :, None])
    values.scatter_(2, place, value[:, :, None])
    is_seen = torch.arange(capacity, device=device) <= lengths[:, None, None, None]
    attended = F.scaled_dot_product_attention(
        query.unflatten(1, (kv_heads, -1)),  # heads that share keys are rows of one query
        keys,
        values,
        attn_mask=is_seen,
    )
    return attended.flatten(1)
