"""The public function: check the arguments, choose the backend, call it."""

import torch
from torch import Tensor

from calm_kernels.backend import Backend, resolve
from calm_kernels.checks import check_device, check_dtype, check_shape, check_tensor
from calm_kernels.decode_attention.eager import decode_attention_eager
from calm_kernels.decode_attention.reference import decode_attention_reference

__all__ = ["decode_attention"]

MAX_HEAD_SIZE, MAX_GROUP = 256, 64
MAX_ELEMENTS = 2**31  # that offsets of 32 bits reach
MAX_FLOAT32 = 1024  # features of all heads of a key, beyond which float32 spills registers


def decode_attention(
    query_key_value: Tensor,
    keys: Tensor,
    values: Tensor,
    rotations: Tensor,
    lengths: Tensor,
    *,
    arrivals: Tensor | None = None,
    backend: Backend | str = Backend.AUTO,
) -> Tensor:
    """One decode step of attention: rotate, write the new key and value, attend to the cache.

    keys[n] = R_n k,  values[n] = v    with n = length, the next column of each sequence
    out = Σ_c softmax_c(R_n q · keys[c] / √D) values[c],    0 <= c <= n

    R_n turns elements i and i + D/2, as a complex number, by ``rotations[n, i]``.

    Args:
        query_key_value: query, key and value of the new chunk side by side,
            ``[B, (heads + 2 kv_heads) D]``; the heads of a query follow each other by the key that
            they share. float32, bfloat16 or, not with Triton, float16 and float64.
        keys: ``[B, kv_heads, capacity, D]``, rotated; written in place. Same dtype.
        values: likewise.
        rotations: unit complex numbers ``[capacity, D/2]``, complex64 (complex128 for float64).
        lengths: columns that each sequence has filled, int64 ``[B]``, 0 to capacity - 1; they are
            not checked, because the host does not read them.
        arrivals: zeros, int32 of at least ``[B kv_heads]``, left as zeros. Triton counts in it
            which parts of a cache are done; without it each call allocates and fills it.
        backend: see `calm_kernels.backend`. Triton reads the filled columns of each sequence alone,
            D up to 256 and up to 64 heads a key; in float32, D times these up to 1024.

    Returns: ``[B, heads D]``. Nothing is differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device, shape or range.

    Cost: 4 heads D operations and 2 D elements of the cache for each column and key head.
    """
    check_tensor("keys", keys, min_dim=4)
    check_dtype("keys", keys)
    batch, kv_heads, capacity, size = keys.shape
    check_shape("keys", keys, (batch, kv_heads, capacity, size), "[B, kv_heads, capacity, D]")
    if size % 2 or size == 0:
        raise ValueError(f"keys must have an even number of features, got {size}")
    for name, tensor in {"values": values, "query_key_value": query_key_value}.items():
        check_tensor(name, tensor)
        check_dtype(name, tensor, (keys.dtype,))
        check_device(name, tensor, "keys", keys)
    check_shape("values", values, keys.shape, "the shape of keys")
    heads = _check_heads(query_key_value, batch, kv_heads, size)
    _check_places(rotations, lengths, keys)
    obstacle = _obstacle(
        keys, heads // max(1, kv_heads), query_key_value, values, rotations, lengths
    )
    arguments = (query_key_value, keys, values, rotations, lengths)
    match resolve(backend, "decode_attention", keys, obstacle=obstacle):
        case Backend.REFERENCE:
            return decode_attention_reference(*arguments)
        case Backend.TRITON:
            from calm_kernels.decode_attention.function import decode_attention_triton

            if arrivals is None:
                arrivals = keys.new_zeros(batch * kv_heads, dtype=torch.int32)
            _check_arrivals(arrivals, keys)
            return decode_attention_triton(*arguments, arrivals)
        case _:
            return decode_attention_eager(*arguments)


def _check_heads(query_key_value: Tensor, batch: int, kv_heads: int, size: int) -> int:
    """The number of query heads, a multiple of `kv_heads`."""
    shape = tuple(query_key_value.shape)
    heads = shape[-1] // size - 2 * kv_heads if shape else 0
    expected = (batch, (heads + 2 * kv_heads) * size)
    if shape != expected or heads < 1 or heads % max(1, kv_heads):
        raise ValueError(
            f"query_key_value must have shape [{batch}, (heads + {2 * kv_heads}) * {size}] with "
            f"heads a multiple of {kv_heads} key heads, got {shape}"
        )
    return heads


def _check_places(rotations: Tensor, lengths: Tensor, keys: Tensor) -> None:
    batch, _, capacity, size = keys.shape
    check_tensor("rotations", rotations)
    kind = torch.complex128 if keys.dtype == torch.float64 else torch.complex64
    check_dtype("rotations", rotations, (kind,))
    check_shape("rotations", rotations, (capacity, size // 2), "capacity, D/2")
    check_device("rotations", rotations, "keys", keys)
    check_tensor("lengths", lengths)
    check_dtype("lengths", lengths, (torch.int64,))
    check_shape("lengths", lengths, (batch,), "columns filled, one number a sequence")
    check_device("lengths", lengths, "keys", keys)


def _check_arrivals(arrivals: Tensor, keys: Tensor) -> None:
    check_tensor("arrivals", arrivals)
    check_dtype("arrivals", arrivals, (torch.int32,))
    check_device("arrivals", arrivals, "keys", keys)
    pairs = keys.shape[0] * keys.shape[1]
    if arrivals.numel() < pairs or not arrivals.is_contiguous():
        raise ValueError(
            f"arrivals must hold {pairs} contiguous counts, one for each sequence and key head; "
            f"got shape {tuple(arrivals.shape)}"
        )


def _obstacle(keys: Tensor, group: int, *others: Tensor) -> str | None:
    """Why the kernel cannot take these arguments, None if it can."""
    if keys.dtype not in (torch.float32, torch.bfloat16):
        return f"takes float32 and bfloat16, got {keys.dtype}"
    if not all(tensor.is_contiguous() for tensor in (keys, *others)):
        return "takes contiguous tensors"
    if keys.shape[-1] > MAX_HEAD_SIZE or group > MAX_GROUP:
        return (
            f"takes heads of up to {MAX_HEAD_SIZE} features and up to {MAX_GROUP} of them a key, "
            f"got {keys.shape[-1]} and {group}"
        )
    if max(keys.shape[2] * keys.shape[3], others[0].numel()) >= MAX_ELEMENTS:
        return "takes less than 2^31 elements of a head's keys, and of all rows"
    if keys.dtype == torch.float32 and keys.shape[-1] * group > MAX_FLOAT32:
        return (
            f"takes up to {MAX_FLOAT32} features of all heads of a key in float32, "
            f"got {keys.shape[-1]} of {group} heads"
        )
    return None
