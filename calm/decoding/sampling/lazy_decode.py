"""Candidates decoded token by token, and only where a token can matter.

A slot is the hidden state of one token of a chunk; projecting it onto the vocabulary gives the
token. A vote asks which of N drawn chunks are equal, and returns one of them. Two kinds of
candidates need no further tokens. If no other candidate has the same first r tokens, this one
differs from all others, whatever its other tokens are. And a group with a common prefix cannot win
if it is smaller than the number of draws that must agree. The choice is the same as after decoding
everything.

Which slots are projected next depends on the tokens found so far, so that the host reads sizes in
between. This is the way of a CPU. A GPU decodes all candidates with fixed shapes.

Shapes: B sequences, N candidates, K tokens (and slots) of a chunk, H hidden size.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from calm_kernels.agreeing_patch import agreeing_patch

__all__ = ["Candidates", "decode_and_vote", "decode_compared", "decode_matching"]

Project = Callable[[Tensor], Tensor]  # hidden states [M, H] -> token ids [M]
_TOKEN_BITS = 32
_UNREAD = -1  # a token that was not decoded
_MARGIN = 1e-5  # of 1/T; wider than the tolerance of `agreeing_patch`, so that no winner is skipped


class Candidates:
    """N candidate chunks for each of B sequences, in groups that agree as far as they are decoded.

    Args:
        slots: one hidden state for each token, ``[N, B, K, H]``.
        project: any slots ``[M, H]`` to token ids ``[M]`` in [0, 2^32).
        given: tokens ``[B, K]``, of which the first `given_length` ``[B]`` are those of every
            candidate and need no decoding; None if nothing is given.
        given_length: see `given`.
        fixed: one more candidate for each sequence, whose tokens are all known, ``[B, K]``.

    Attributes:
        projected: number of slots projected so far.
    """

    def __init__(
        self,
        slots: Tensor,
        project: Project,
        given: Tensor | None = None,
        given_length: Tensor | None = None,
        *,
        fixed: Tensor | None = None,
    ) -> None:
        num_drawn, batch, patch_size, _ = slots.shape
        num_candidates = num_drawn + (fixed is not None)
        self._slots, self._project = slots.flatten(0, 1), project
        self._shape = (num_candidates, batch)
        row = torch.arange(batch, device=slots.device).repeat(num_candidates)  # [N * B]
        self._row = row
        self._group, self._num_groups = row.clone(), batch
        self._size = torch.full_like(row, num_candidates)  # of its group
        self._depth = torch.zeros_like(row)  # tokens decoded
        self._tokens = row.new_full((len(row), patch_size), _UNREAD)
        if fixed is not None:
            self._tokens[len(self._slots) :] = fixed
        if given is not None and given_length is not None:
            self._depth, self._tokens = given_length[row], given[row]
        self.projected = 0

    @property
    def groups(self) -> Tensor:
        """Which candidates agree, int64 ``[B, N]``: equal numbers for equal tokens so far."""
        return self._group.view(self._shape).T

    def split(self, size: Tensor | int) -> None:
        """Decode every group of at least `size` (and two) candidates to the end.

        Args:
            size: one for all sequences, or ``[B]``. After 2, equal group numbers mean equal chunks.
        """
        needed = torch.as_tensor(size, device=self._row.device).clamp(min=2).expand(self._shape[1])
        needed = needed[self._row]
        for slot in range(self._tokens.shape[1]):
            index = ((self._depth == slot) & (self._size >= needed)).nonzero()[:, 0]
            if len(index):
                self._decode(index, self._depth[index])
                self._regroup(index, self._tokens[index, slot])
                self._depth[index] = slot + 1

    def split_largest(self, size: int) -> None:
        """Decode every group of at least `size` candidates to the end.

        Where no chunk of a sequence occurs `size` times, its most frequent chunks are decoded.
        """
        needed = self._row.new_full(self._shape[1:], size)
        while True:
            self.split(needed)
            is_open = (self._depth < self._tokens.shape[1]) & (self._size > 1)
            sizes = self._size.view(self._shape)
            is_open = is_open.view(self._shape)
            certain = sizes.masked_fill(is_open, 0).amax(0)
            possible = sizes.masked_fill(~is_open, 0).amax(0)
            lower = torch.where(certain >= needed, needed, torch.maximum(certain, possible))
            if torch.equal(lower, needed):
                return
            needed = lower

    def tokens(self, index: Tensor) -> Tensor:
        """All tokens of candidate `index` ``[B]`` of each sequence, ``[B, K]``."""
        flat = index * self._shape[1] + torch.arange(self._shape[1], device=index.device)
        slot = torch.arange(self._tokens.shape[1], device=index.device)
        missing = (slot >= self._depth[flat][:, None]).nonzero()
        if len(missing):
            self._decode(flat[missing[:, 0]], missing[:, 1])
        return self._tokens[flat]

    def drawn_tokens(self) -> Tensor:
        """Tokens of all candidates except the fixed ones, ``[N, B, K]``; -1 if not decoded."""
        return self._tokens[: len(self._slots)].unflatten(0, (-1, self._shape[1]))

    def _decode(self, index: Tensor, slot: Tensor) -> None:
        is_drawn = index < len(self._slots)
        index, slot = index[is_drawn], slot[is_drawn]
        self._tokens[index, slot] = self._project(self._slots[index, slot])
        self.projected += len(index)

    def _regroup(self, index: Tensor, tokens: Tensor) -> None:
        """Split groups by their next token; `index` holds all candidates of these groups."""
        key = (self._group[index] << _TOKEN_BITS) | tokens
        _, place, sizes = key.unique(return_inverse=True, return_counts=True)
        self._group[index] = self._num_groups + place
        self._size[index] = sizes[place]
        self._num_groups += len(sizes)


def decode_and_vote(
    candidates: Candidates, temperature: float, *, seed: Tensor, first_row: int = 0
) -> tuple[Tensor, Tensor]:
    """Algorithm 2 over candidates, decoded only as far as the choice depends on them.

    Args:
        candidates: N for each of B sequences.
        temperature: T in (0, 1].
        seed: of the vote, int64 ``[2]`` or ``[B, 2]``.
        first_row: global index of the first row.

    Returns: tokens ``[B, K]`` and how many draws agreed, ``[B]``: those of
        `calm_kernels.agreeing_patch` on all tokens.
    """
    power = 1.0 / temperature
    beyond = candidates.groups.shape[1] + 1  # a size that no group has
    candidates.split_largest(min(math.ceil(power - _MARGIN * power), beyond))
    groups = candidates.groups
    chosen, num_agreeing, *_ = agreeing_patch(
        groups[..., None], power, seed=seed, first_row=first_row
    )
    index = (groups == chosen).to(torch.uint8).argmax(1)
    return candidates.tokens(index), num_agreeing


def decode_compared(slots: Tensor, project: Project, target: Tensor) -> Tensor:
    """Tokens of draws as far as a comparison with the target and each other depends on them.

    A draw whose first tokens differ from those of the target and of every other draw matches
    nothing, whatever its other tokens are.

    Args:
        slots: one hidden state for each token of N draws, ``[N, ..., K, H]``.
        project: slots ``[M, H]`` to token ids ``[M]``.
        target: the true chunk, ``[..., K]``; negative ids match nothing.

    Returns: int64 ``[N, ..., K]``, -1 where nothing was decoded.
    """
    nothing = (1 << (_TOKEN_BITS - 1)) - 1  # no id of a vocabulary
    fixed = target.where(target >= 0, nothing).flatten(0, -2)
    candidates = Candidates(slots.flatten(1, -3), project, fixed=fixed)
    candidates.split(2)
    return candidates.drawn_tokens().view(*slots.shape[:-1])


def decode_matching(slots: Tensor, project: Project, given: Tensor, given_length: Tensor) -> Tensor:
    """Which candidates begin with the given tokens; each is decoded up to its first mismatch.

    Args:
        slots: ``[N, B, K, H]``.
        project: slots ``[M, H]`` to token ids ``[M]``.
        given: ``[B, K]``.
        given_length: how many of them are given, int64 ``[B]``, 0 to K.

    Returns: bool ``[N, B]``.
    """
    num_candidates, batch = slots.shape[:2]
    row = torch.arange(batch, device=slots.device).repeat(num_candidates)
    flat, length = slots.flatten(0, 1), given_length[row]
    fits = torch.ones_like(row, dtype=torch.bool)
    for slot in range(int(given_length.max())):
        index = (fits & (length > slot)).nonzero()[:, 0]
        fits[index] = project(flat[index, slot]) == given[row[index], slot]
    return fits.view(num_candidates, batch)
