"""Cross-entropy with all logits in memory."""

import torch
import torch.nn.functional as F
from torch import Tensor

from calm_kernels.precision import accumulation_dtype

__all__ = ["linear_cross_entropy_reference"]


def linear_cross_entropy_reference(
    rows: Tensor,  # [R, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [R]
    ignore_index: int,
    matmul_dtype: torch.dtype,
    negligible: float,
) -> Tensor:
    """Mean cross-entropy, scalar; see `calm_kernels.linear_cross_entropy`."""
    dtype = accumulation_dtype(matmul_dtype)
    logits = rows.to(matmul_dtype).to(dtype) @ weight.to(matmul_dtype).to(dtype).T  # [R, V]
    if negligible > 0.0:
        targets = labels.where(labels != ignore_index, 0)[:, None]
        gradient = logits.detach().softmax(dim=-1)  # of each row's loss by its logits
        gradient.scatter_add_(1, targets, gradient.new_full(targets.shape, -1.0))
        logits = logits.detach().where(gradient.abs() < negligible, logits)  # NaN stays
    return F.cross_entropy(logits, labels, ignore_index=ignore_index)
