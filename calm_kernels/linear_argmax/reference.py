"""Argmax over the vocabulary with all logits in memory."""

from torch import Tensor

from calm_kernels.precision import accumulation_dtype

__all__ = ["linear_argmax_reference"]


def linear_argmax_reference(
    rows: Tensor,  # [R, H]
    weight: Tensor,  # [V, H]
    with_logsumexp: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Index, largest entry and log-sum-exp, ``[R]`` each; see `calm_kernels.linear_argmax`."""
    dtype = accumulation_dtype(rows.dtype)
    logits = rows.to(dtype) @ weight.to(rows.dtype).to(dtype).T  # [R, V]
    index = logits.argmax(dim=-1)
    largest = logits.gather(-1, index[:, None])[:, 0]
    return index, largest, logits.logsumexp(dim=-1) if with_logsumexp else None
