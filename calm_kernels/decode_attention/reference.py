"""The formula, sequence by sequence and head by head; float64 works."""

import torch
from torch import Tensor

__all__ = ["decode_attention_reference"]


def decode_attention_reference(
    query_key_value: Tensor,  # [B, (heads + 2 kv_heads) D]
    keys: Tensor,  # [B, kv_heads, capacity, D]
    values: Tensor,
    rotations: Tensor,  # [capacity, D/2] complex
    lengths: Tensor,  # [B]
) -> Tensor:
    """Attended values, ``[B, heads D]``; see `calm_kernels.decode_attention`."""
    batch, kv_heads, _, size = keys.shape
    rows = query_key_value.unflatten(1, (-1, size))
    query, key, value = rows.split((rows.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    group = query.shape[1] // kv_heads
    attended = torch.empty_like(query)
    for sequence in range(batch):
        column = int(lengths[sequence])
        rotation = rotations[column]
        keys[sequence, :, column] = _rotate(key[sequence], rotation)
        values[sequence, :, column] = value[sequence]
        rotated = _rotate(query[sequence], rotation)
        for head in range(query.shape[1]):
            seen = keys[sequence, head // group, : column + 1]
            scores = seen @ rotated[head] / size**0.5
            weights = scores.softmax(dim=0)
            attended[sequence, head] = weights @ values[sequence, head // group, : column + 1]
    return attended.flatten(1)


def _rotate(heads: Tensor, rotation: Tensor) -> Tensor:
    """Elements i and i + D/2 of ``[heads, D]`` as a complex number, times its rotation."""
    real, imaginary = heads.to(rotation.real.dtype).chunk(2, dim=-1)
    turned = torch.complex(real, imaginary) * rotation
    return torch.cat([turned.real, turned.imag], dim=-1).to(heads.dtype)
