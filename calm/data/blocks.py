"""Blocks of tokens as training sees them; reading text is for `calm.data.packing`."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from calm.errors import UserError
from calm.labels import IGNORE_INDEX

__all__ = ["Block", "check_block_size", "collate", "make_block", "pack"]

Block = dict[str, np.ndarray]


def make_block(tokens: np.ndarray, block_size: int, pad_token_id: int) -> Block:
    """Inputs and labels of at most `block_size` tokens; the rest of the block is padding.

    Negative entries are tokens that are only read, see `align_documents`.
    """
    inputs = np.full(block_size, pad_token_id, dtype=np.int64)
    labels = np.full(block_size, IGNORE_INDEX, dtype=np.int64)
    is_label = tokens >= 0
    inputs[: len(tokens)] = np.where(is_label, tokens, ~tokens)
    labels[: len(tokens)] = np.where(is_label, tokens, IGNORE_INDEX)
    return {"input_ids": inputs, "labels": labels}


def pack(
    documents: Iterable[Sequence[int] | np.ndarray], block_size: int, pad_token_id: int
) -> Iterator[Block]:
    """Blocks of `block_size` tokens of the concatenated `documents`; the last one is padded."""
    pending: list[np.ndarray] = []
    held = 0
    for document in documents:
        pending.append(np.asarray(document, dtype=np.int64))
        held += len(pending[-1])
        if held >= block_size:
            tokens = np.concatenate(pending)
            whole = held - held % block_size
            for start in range(0, whole, block_size):
                yield make_block(tokens[start : start + block_size], block_size, pad_token_id)
            pending, held = [tokens[whole:]], held - whole
    if held:
        yield make_block(np.concatenate(pending), block_size, pad_token_id)


def collate(blocks: Sequence[Block]) -> dict[str, Tensor]:
    """Blocks as one batch: ``input_ids`` and ``labels``, both ``[B, block_size]`` int64."""
    return {
        key: torch.from_numpy(np.stack([block[key] for block in blocks]))
        for key in ("input_ids", "labels")
    }


def check_block_size(block_size: int, patch_size: int) -> None:
    """`block_size` must be a multiple of `patch_size` and hold at least two chunks."""
    if block_size % patch_size or block_size < 2 * patch_size:
        nearest = max(2, round(block_size / patch_size)) * patch_size
        raise UserError(
            f"block_size must be a multiple of patch_size (K={patch_size}) and at least "
            f"{2 * patch_size}; got {block_size}, try {nearest}"
        )
