"""What generation returns."""

from dataclasses import dataclass

import torch
from torch import Tensor

from calm.decoding.text.prompt import left_aligned
from calm.decoding.text.transcript import Transcript

__all__ = ["Generation", "Times", "assemble"]


@dataclass
class Times:
    """Wall time in seconds.

    Attributes:
        warmup: allocating the cache, compiling and capturing the step; almost nothing where an
            earlier call did it.
        prefill: reading the prompts.
        decode: everything after.
    """

    warmup: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True)
class Generation:
    """What `generate` returns with ``return_details=True``; tables hold 0 after a sequence's end.

    Attributes:
        sequences: prompt and new tokens, ``[B, T]``; what follows is padding.
        new_tokens: generated tokens of each sequence, ``[B]``.
        levels: draws that agreed on each new chunk, ``[B, chunks]``: the whole part of 1/T, or less
            where a vote found no more; 1 for methods without a vote.
        draws: head draws of each chunk, ``[B, chunks]``; ``exact`` counts as Algorithm 1 is
            written.
        saved: those of them that were never made, because a round stopped at its first mismatch,
            ``[B, chunks]``.
        fallbacks: whether the method's fallback decided, bool ``[B, chunks]``.
        warmup_seconds: allocating the cache, compiling and capturing, which the next call on a GPU
            need not repeat; not part of any other number.
        prefill_seconds: reading the prompts.
        decode_seconds: everything after.
    """

    sequences: Tensor
    new_tokens: Tensor
    levels: Tensor
    draws: Tensor
    saved: Tensor
    fallbacks: Tensor
    warmup_seconds: float
    prefill_seconds: float
    decode_seconds: float

    @property
    def seconds(self) -> float:
        """Wall time without the warmup."""
        return self.prefill_seconds + self.decode_seconds

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all sequences, divided by `seconds`."""
        return float(self.new_tokens.sum()) / self.seconds


def assemble(
    transcript: Transcript,
    times: Times,
    *,
    padding: int | None,
    moves_padding: bool,
    device: torch.device,
) -> Generation:
    """The transcript as tensors.

    Args:
        transcript: complete.
        times: of its making.
        padding: follows a sequence's end; None if all are of one length.
        moves_padding: move all tokens that equal `padding` to the end of their row (published).
        device: of the result; the tables stay on the CPU.
    """
    rows = transcript.sequences()
    sequences = left_aligned(rows, fill=padding or 0)
    if moves_padding and padding is not None:
        order = (sequences == padding).to(torch.uint8).argsort(dim=1, stable=True)
        sequences = sequences.gather(1, order)
    return Generation(
        sequences.to(device),
        torch.tensor([len(new) for new in transcript.new]),
        levels=transcript.table("num_agreeing"),
        draws=transcript.table("draws"),
        saved=transcript.table("saved"),
        fallbacks=transcript.table("is_fallback").bool(),
        warmup_seconds=times.warmup,
        prefill_seconds=times.prefill,
        decode_seconds=times.decode,
    )
