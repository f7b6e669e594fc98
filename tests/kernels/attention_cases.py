"""A cache that is filled in part, and the new chunk of each sequence."""

import torch

# sequences, key heads, query heads a key, D, capacity, columns filled
SIZES = [
    (1, 1, 1, 2, 1, (0,)),
    (2, 2, 1, 8, 5, (3, 0)),
    (3, 1, 3, 6, 9, (7, 5, 8)),
]


def make_case(size, generator):
    """Arguments of `decode_attention` in float64; what is not filled is NaN."""
    batch, kv_heads, group, width, capacity, lengths = size
    options = {"generator": generator, "dtype": torch.float64}
    keys, values = torch.randn(2, batch, kv_heads, capacity, width, **options)
    for sequence, length in enumerate(lengths):
        keys[sequence, :, length:] = values[sequence, :, length:] = torch.nan
    rows = torch.randn(batch, (group + 2) * kv_heads * width, **options)
    angles = torch.randn(capacity, width // 2, **options)
    return rows, keys, values, torch.polar(torch.ones_like(angles), angles), torch.tensor(lengths)


def cast(case, dtype):
    """Copies in another dtype."""
    *tensors, rotations, lengths = case
    complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
    return (
        *(tensor.to(dtype, copy=True) for tensor in tensors),
        rotations.to(complex_dtype),
        lengths,
    )


def finite(case):
    """The same with zeros in place of NaN: backends may multiply what they mask by zero."""
    rows, keys, values, *others = case
    return rows, keys.nan_to_num(0.0), values.nan_to_num(0.0), *others
