"""The torch backend: what does not depend on the noise is computed once a row, not once a draw.

The draws of a row are neighbours in memory, ``[R, N, C]``, so that the context is added by
broadcasting over N and its gradient is a sum over neighbours.
"""

import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from calm_kernels.energy_head.parameters import NORM_EPS, BlockParameters, HeadParameters, Pair

__all__ = ["energy_head_eager"]


def energy_head_eager(
    hidden: Tensor,  # [R, C]
    noise: Tensor,  # [N, R, Z]
    head: HeadParameters,
    recompute: bool,
) -> Tensor:
    """Latents ``[N, R, L]``, a view of ``[R, N, L]``; see `calm_kernels.energy_head`."""
    noise = noise.transpose(0, 1).to(hidden.dtype)
    sample = _norm(F.linear(noise, *head.noise_embd), head.norm_noise)  # [R, N, C]
    for block, context in zip(head.blocks, _contexts(hidden, head), strict=True):
        if recompute:
            sample = checkpoint(
                _block, sample, context, block, use_reentrant=False, preserve_rng_state=False
            )
        else:
            sample = _block(sample, context, block)
    features = F.silu(F.linear(_norm(sample, head.final_norm), *head.final_first))
    return F.linear(features, *head.final_second).transpose(0, 1)


def _contexts(hidden: Tensor, head: HeadParameters) -> tuple[Tensor, ...]:
    """W₁'s context half of every block and b₁, ``[R, 1, C]`` each.

    Not one matmul: joining the weights would cost a decode step more than it saves, and would not
    speed up a training step.
    """
    width = hidden.shape[-1]
    context = _norm(F.linear(hidden, *head.hidden_embd), head.norm_hidden)
    return tuple(
        F.linear(context, block.first.weight[:, width:], block.first.bias)[:, None]
        for block in head.blocks
    )


def _block(sample: Tensor, context: Tensor, block: BlockParameters) -> Tensor:
    width = sample.shape[-1]
    features = F.linear(_norm(sample, block.norm), block.first.weight[:, :width])
    features = F.silu(features + context)
    features = F.silu(F.linear(features, *block.second))
    gate, up = F.linear(features, *block.gate_up).chunk(2, dim=-1)
    return sample + F.linear(F.silu(gate) * up, *block.down)


def _norm(values: Tensor, norm: Pair) -> Tensor:
    return F.layer_norm(values, values.shape[-1:], *norm, eps=NORM_EPS)
