"""Labels: counting chunks, and means over those that count.

A label of -100 does not count, as in PyTorch's and transformers' losses.
"""

from torch import Tensor

__all__ = ["IGNORE_INDEX", "num_chunks", "weighted_mean"]

IGNORE_INDEX = -100


def num_chunks(input_ids: Tensor, patch_size: int) -> int:
    """P of token ids ``[B, P*K]``; raises `ValueError` for anything else."""
    if input_ids.dim() != 2 or input_ids.shape[1] % patch_size:
        raise ValueError(
            f"input_ids must have shape [B, P * patch_size] with patch_size {patch_size}, "
            f"got {tuple(input_ids.shape)}"
        )
    return input_ids.shape[1] // patch_size


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Mean of `values` over the entries whose `weight` is 1 rather than 0; 0 if there are none."""
    return (values * weight).sum() / weight.sum().clamp(min=1)
