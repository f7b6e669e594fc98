"""Labels: counting chunks, and means over what counts.

A label of -100 does not count, as in PyTorch's and transformers' losses.
"""

from typing import NamedTuple

from torch import Tensor

__all__ = ["IGNORE_INDEX", "Term", "chunk_labels", "counted_chunks", "num_chunks"]

IGNORE_INDEX = -100


def num_chunks(input_ids: Tensor, patch_size: int) -> int:
    """P of token ids ``[B, P*K]``; raises `ValueError` for anything else."""
    if input_ids.dim() != 2 or input_ids.shape[1] % patch_size:
        raise ValueError(
            f"input_ids must have shape [B, P * patch_size] with patch_size {patch_size}, "
            f"got {tuple(input_ids.shape)}"
        )
    return input_ids.shape[1] // patch_size


def counted_chunks(targets: Tensor, patch_size: int) -> Tensor:
    """Which chunks of labels ``[B, S*K]`` count, bool ``[B, S]``: where the first is not -100."""
    return targets[:, ::patch_size] != IGNORE_INDEX


def chunk_labels(targets: Tensor, patch_size: int) -> Tensor:
    """Labels ``[B, S*K]`` as ``[B, S, K]``, -100 in all of a chunk that does not count."""
    is_masked = ~counted_chunks(targets, patch_size)[..., None]
    return targets.unflatten(1, (-1, patch_size)).masked_fill(is_masked, IGNORE_INDEX)


class Term(NamedTuple):
    """A quantity that is averaged over the tokens or chunks that count, before the division.

    The sums and counts of several batches add up, so that their mean does not depend on how the
    batches were cut. Means of batches do not add up: a batch may hold more labels than another.

    Attributes:
        sums: of each sequence ``[B, ...]``, or of all sequences ``[1, ...]``.
        counts: how many entries of each sequence count, ``[B]``.
    """

    sums: Tensor
    counts: Tensor

    def mean(self, count: Tensor | None = None) -> Tensor:
        """Σ sums / Σ counts, ``[...]``; 0, with zero gradients, where nothing counts.

        Args:
            count: divide by this number instead, which the batch shares with others; the results
                of these batches then add up to their mean.
        """
        count = self.counts.sum() if count is None else count
        return self.sums.sum(0) / count.clamp(min=1)

    def detach(self) -> "Term":
        """Without gradients."""
        return Term(self.sums.detach(), self.counts)
