"""Where the gradients of biases and LayerNorms lie: sums over rows, kept in one array.

The backward kernels write the sums of each group of rows, ``[groups, GradientSlots.count, C]``. One
addition over the groups, always in the same order, finishes them all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from calm_kernels.energy_head.parameters import (
    BlockParameters,
    HeadParameters,
    Pair,
    flatten_parameters,
)

__all__ = ["GradientSlots", "join_gradients"]


@dataclass(frozen=True)
class GradientSlots:
    """Index of each vector of C sums in the head's array of them."""

    num_blocks: int

    hidden = 0  # norm_hidden's weight and bias, hidden_embd's bias

    def norm(self, index: int) -> int:
        """Block `index` (or the last layer): its norm's weight and bias, then the bias added to
        its input, which is norm_noise's or that of the block before (`down`).
        """
        return 3 + 3 * index

    @property
    def noise(self) -> int:
        """norm_noise's weight, noise_embd's bias."""
        return self.norm(self.num_blocks + 1)

    def first(self, index: int) -> int:
        """Bias of a block's first linear."""
        return self.noise + 2 + 4 * index

    def second(self, index: int) -> int:
        """Bias of a block's second linear."""
        return self.first(index) + 1

    def gate_up(self, index: int) -> int:
        """Bias of a block's third linear, two vectors."""
        return self.first(index) + 2

    @property
    def final(self) -> int:
        """Bias of the last layer's first linear."""
        return self.first(self.num_blocks)

    @property
    def count(self) -> int:
        """All vectors."""
        return self.final + 1


def join_gradients(
    matrices: Sequence[Tensor], vectors: Tensor, output_bias: Tensor, num_blocks: int
) -> list[Tensor]:
    """Gradients in the order of `flatten_parameters`.

    Args:
        matrices: of the weights, in the same order.
        vectors: finished sums ``[GradientSlots.count, C]``.
        output_bias: of the last linear, ``[L]``.
        num_blocks: D.
    """
    slots = GradientSlots(num_blocks)
    noise_embd, hidden_embd, *inner, final_first, final_second = matrices
    blocks = []
    for index in range(num_blocks):
        first, second, gate_up, down = inner[4 * index : 4 * index + 4]
        norm, start = slots.norm(index), slots.gate_up(index)
        blocks.append(
            BlockParameters(
                norm=Pair(vectors[norm], vectors[norm + 1]),
                first=Pair(first, vectors[slots.first(index)]),
                second=Pair(second, vectors[slots.second(index)]),
                gate_up=Pair(gate_up, vectors[start : start + 2].view(-1)),
                down=Pair(down, vectors[slots.norm(index + 1) + 2]),
            )
        )
    last = slots.norm(num_blocks)
    return flatten_parameters(
        HeadParameters(
            noise_embd=Pair(noise_embd, vectors[slots.noise + 1]),
            norm_noise=Pair(vectors[slots.noise], vectors[slots.norm(0) + 2]),
            hidden_embd=Pair(hidden_embd, vectors[slots.hidden + 2]),
            norm_hidden=Pair(vectors[slots.hidden], vectors[slots.hidden + 1]),
            blocks=tuple(blocks),
            final_norm=Pair(vectors[last], vectors[last + 1]),
            final_first=Pair(final_first, vectors[slots.final]),
            final_second=Pair(final_second, output_bias),
        )
    )
