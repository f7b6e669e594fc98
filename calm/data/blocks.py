"""Blocks of tokens as training sees them; reading text into blocks is for `calm.data.packing`."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["Block", "collate"]

Block = dict[str, np.ndarray]


def collate(blocks: Sequence[Block]) -> dict[str, Tensor]:
    """Blocks as one batch: ``input_ids`` and ``labels``, both ``[B, block_size]`` int64."""
    return {
        key: torch.from_numpy(np.stack([block[key] for block in blocks]))
        for key in ("input_ids", "labels")
    }
