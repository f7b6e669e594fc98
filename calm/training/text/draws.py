"""Where draws come from: seed and offset of a forward pass, and the row of its first sequence."""

import torch
from torch import Tensor
from transformers import TrainingArguments

__all__ = ["DrawAddress"]


class DrawAddress:
    """Addresses of the draws of a run, the same whatever cut its batches into micro-batches.

    Args:
        args: of the run, with its device and its processes.
        batch_size: sequences of a micro-batch of one process.
    """

    def __init__(self, args: TrainingArguments, batch_size: int) -> None:
        self._args, self._batch_size = args, batch_size
        self._step, self._micro_batch = -1, 0
        self._address: tuple[int, int] | None = None
        self._seed: Tensor | None = None

    def next_first_row(self, step: int) -> int:
        """Index of the first sequence of the next micro-batch within the whole batch of `step`.

        The data loader gives micro-batches to the processes in turn.
        """
        if self._step != step:
            self._step, self._micro_batch = step, 0
        dealt = self._micro_batch * self._args.world_size + self._args.process_index
        self._micro_batch += 1
        return dealt * self._batch_size

    def seed(self, seed: int, offset: int) -> Tensor:
        """Both as int64 ``[2]`` on the device; made once for all micro-batches of a step."""
        if self._seed is None or self._address != (seed, offset):
            # Filled on the device, since a copy from the host would synchronise.
            filled = [torch.full((), value, device=self._args.device) for value in (seed, offset)]
            self._address, self._seed = (seed, offset), torch.stack(filled)
        return self._seed
