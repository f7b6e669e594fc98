"""Teachers: trained language models from which a student learns by their draws alone.

After every chunk of a student's text a teacher draws M continuations of the next K tokens. It reads
the text once, into a KV cache; every draw is a branch that attends to the text before it and to its
own tokens (`calm.evaluation.rollout.Branches`), and all branches advance together.

A student with a start chunk reads documents that are filled up to whole chunks. A teacher reads
them as in its own training: without what fills them, and without start chunks if it has none; a
text that begins with a start chunk then begins with an end token, as if another document had ended
there.

Shapes: B sequences, S chunks of K tokens, M draws, k tokens that the teacher draws at once, U units
of so many tokens, Q chunks that are branched off together, H hidden size, V vocabulary size.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from calm.decoding.sampling.seeds import OFFSET_STRIDE, advance, row_seeds
from calm.errors import UserError
from calm.evaluation.rollout import MAX_BRANCHES, Branches
from calm.evaluation.samplers import LOGITS_AT_A_TIME
from calm.models import BaselineTransformer, ContinuousTransformer
from calm_kernels.noise import Stream
from calm_kernels.softmax_draws import softmax_draws
from calm_kernels.uniform_draws import uniform_draws

__all__ = ["ChunkTeacher", "Documents", "Teacher", "TokenTeacher"]


class Documents(NamedTuple):
    """How a student's text shows where documents begin and end.

    Attributes:
        start_token_id: token of the start chunk before each; None if they are only concatenated.
        end_token_id: their last token, which also fills their last chunk if there are start chunks.
    """

    start_token_id: int | None
    end_token_id: int


class Teacher(Protocol):
    """A model that continues a student's text."""

    @property
    def model(self) -> Any:
        """The model, frozen and in evaluation mode."""

    def continuations(
        self,
        input_ids: Tensor,
        *,
        num_draws: int,
        length: int,
        seed: Tensor,
        first_row: int | Tensor = 0,
    ) -> Tensor:
        """Draws of what follows each chunk.

        Args:
            input_ids: text of the student, int64 ``[B, S*K]``.
            num_draws: M.
            length: K, tokens of a chunk and of a draw; a multiple of k.
            seed: int64 ``[2]`` of (seed, offset).
            first_row: global index of the first chunk; any split of a batch draws the same.

        Returns: int64 ``[M, B, S, K]``. What follows an end token is end tokens if the student's
            documents are filled up so.
        """


@dataclass(frozen=True)
class _BranchingTeacher:
    """What teachers share.

    Attributes:
        model: the model, frozen and in evaluation mode.
        documents: of the student's text.
    """

    model: Any
    documents: Documents
    reads_start_chunks: ClassVar[bool]

    @property
    def unit(self) -> int:
        """Tokens that it draws at once, k."""
        raise NotImplementedError

    def _backbone(self) -> Any:
        raise NotImplementedError

    def _embed(self, input_ids: Tensor) -> Tensor:
        """Token ids ``[B, U*k]`` to inputs ``[B, U, H]``."""
        raise NotImplementedError

    def _draw(
        self, hidden: Tensor, num_draws: int, seeds: Tensor, depth: int
    ) -> tuple[Tensor, Tensor]:
        """The unit after each state, ``[M, B, Q, k]``, and whether all it came from was finite.

        Args:
            hidden: ``[M, B, Q, H]``, or ``[1, B, Q, H]`` for draws after one state.
            num_draws: M.
            seeds: int64 ``[B, Q, 2]``.
            depth: units drawn before.
        """
        raise NotImplementedError

    @torch.no_grad()
    def continuations(
        self,
        input_ids: Tensor,
        *,
        num_draws: int,
        length: int,
        seed: Tensor,
        first_row: int | Tensor = 0,
    ) -> Tensor:
        """See `Teacher`.

        Raises:
            UserError: what the teacher says is not finite.

        Cost: a forward pass over the text, then M of a unit for each further unit of a chunk. At
        most `MAX_BRANCHES` branches of a sequence advance together. It waits for the device once.
        """
        read, last = self._read(input_ids, length)
        rows = torch.arange(input_ids.numel() // length, device=input_ids.device) + first_row
        seeds = row_seeds(seed, rows.view(len(input_ids), -1), Stream.TEACHER)
        branches = Branches(self._backbone(), self._embed(read))
        size = max(1, MAX_BRANCHES // num_draws)
        parts = zip(last.split(size, dim=1), seeds.split(size, dim=1), strict=True)
        drawn, usable = zip(
            *(self._continue(branches, *part, num_draws, length) for part in parts), strict=True
        )
        if not torch.stack(usable).all():
            raise UserError(
                f"teacher: the {type(self.model).__name__} must say what is finite, got NaN or "
                "infinity; `calm eval` shows whether it works alone: if it does, distil without "
                "--bf16, else take another of its checkpoints"
            )
        tokens = torch.cat(drawn, dim=2)
        if self.documents.start_token_id is None:
            return tokens
        is_end = tokens == self.documents.end_token_id
        is_over = is_end.cumsum(-1) > is_end.long()  # an end token came before
        return tokens.masked_fill(is_over, self.documents.end_token_id)

    def _continue(
        self, branches: Branches, last: Tensor, seeds: Tensor, num_draws: int, length: int
    ) -> tuple[Tensor, Tensor]:
        """Draws ``[M, B, Q, K]`` after the units `last` ``[B or 1, Q]``, with ``[B, Q, 2]`` seeds.

        Draw m of chunk q is branch m Q + q. Second is whether all they came from was finite.
        """
        hidden = torch.take_along_dim(branches.hidden, last[..., None], dim=1)[None]
        branches.begin(last.repeat(1, num_draws))
        drawn = [self._draw(hidden, num_draws, seeds, 0)]
        for depth in range(1, length // self.unit):
            states = branches.extend(self._embed(drawn[-1][0].transpose(0, 1).flatten(1)))
            hidden = states.unflatten(1, (num_draws, -1)).transpose(0, 1)
            drawn.append(self._draw(hidden, num_draws, seeds, depth))
        tokens, usable = zip(*drawn, strict=True)
        return torch.cat(tokens, dim=-1), torch.stack(usable).all()

    def _read(self, input_ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The text as the teacher reads it, and where in it the student's chunks end.

        Returns: token ids ``[B, U*k]``, whatever is not read moved behind the text; the index of
            the last unit that is read at the end of each chunk, ``[B, S]`` or ``[1, S]``.
        """
        start, end = self.documents
        per_chunk = length // self.unit
        if start is None:
            units = torch.arange(input_ids.shape[1] // self.unit, device=input_ids.device)
            return input_ids, units[None, per_chunk - 1 :: per_chunk]
        chunks = input_ids.unflatten(1, (-1, length))
        is_start, is_end = (chunks == start).all(-1), chunks == end
        is_fill = F.pad(is_end[..., 1:] & is_end[..., :-1], (1, 0))
        is_read = ~(is_start[..., None] | is_fill)
        if self.reads_start_chunks:
            is_read[..., 0] |= is_start  # its first unit
        else:
            is_read[:, 0, 0] = True
            opening = torch.where(is_start[:, 0], end, chunks[:, 0, 0])
            input_ids = torch.cat([opening[:, None], input_ids[:, 1:]], dim=1)
        is_read = is_read.flatten(1)[:, :: self.unit]  # [B, U]
        order = (~is_read).to(torch.int8).argsort(dim=1, stable=True)
        by_unit = input_ids.unflatten(1, (-1, self.unit))
        read = torch.take_along_dim(by_unit, order[..., None], dim=1).flatten(1)
        return read, is_read.cumsum(1)[:, per_chunk - 1 :: per_chunk] - 1


@dataclass(frozen=True)
class TokenTeacher(_BranchingTeacher):
    """A token-by-token model: k = 1.

    A draw takes K uniforms, the first among the draws of one softmax.

    Attributes:
        model: the baseline.
    """

    model: BaselineTransformer
    reads_start_chunks = False

    @property
    def unit(self) -> int:
        """See `_BranchingTeacher`."""
        return 1

    def _backbone(self) -> Any:
        return self.model.model

    def _embed(self, input_ids: Tensor) -> Tensor:
        return self.model.model.embed_tokens(input_ids)

    def _draw(
        self, hidden: Tensor, num_draws: int, seeds: Tensor, depth: int
    ) -> tuple[Tensor, Tensor]:
        own = advance(seeds, depth).flatten(0, 1)
        uniforms = uniform_draws(
            len(own), 1, stream=Stream.TEACHER, seed=own, num_draws=num_draws,
            device=hidden.device, dtype=torch.float64,
        )[..., 0]  # fmt: skip
        states = hidden.flatten(1, 2)  # [M or 1, B*Q, H]
        points = uniforms.reshape(len(states), -1, len(own))
        points = points.transpose(1, 2).contiguous()  # those of one state are last
        size = max(1, LOGITS_AT_A_TIME // self.model.config.vocab_size)
        parts = zip(states.flatten(0, 1).split(size), points.flatten(0, 1).split(size), strict=True)
        lm_head = self.model.lm_head
        drawn, usable = zip(
            *(softmax_draws(lm_head(state), point) for state, point in parts), strict=True
        )
        tokens = torch.cat(drawn).view(points.shape).transpose(1, 2)
        return tokens.reshape(num_draws, *seeds.shape[:2], 1), torch.cat(usable).all()


@dataclass(frozen=True)
class ChunkTeacher(_BranchingTeacher):
    """A CALM of smaller chunks: k is its K. Its head draws.

    Attributes:
        model: the CALM. If the student has start chunks, it has them, too.
    """

    model: ContinuousTransformer
    reads_start_chunks = True

    @property
    def unit(self) -> int:
        """See `_BranchingTeacher`."""
        return self.model.patch_size

    def _backbone(self) -> Any:
        return self.model.transformer

    def _embed(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_patches(input_ids)

    def _draw(
        self, hidden: Tensor, num_draws: int, seeds: Tensor, depth: int
    ) -> tuple[Tensor, Tensor]:
        head = self.model.generative_head
        if len(hidden) == 1:
            states, own = hidden[0].flatten(0, 1), advance(seeds, depth).flatten(0, 1)
            latents = head.sample(states, num_samples=num_draws, seed=own)
        else:
            draws = torch.arange(num_draws, device=seeds.device)[:, None, None]
            own = advance(seeds, depth + OFFSET_STRIDE * draws).flatten(0, 2)
            latents = head.sample(hidden.flatten(0, 2), seed=own)
        tokens = self.model.decode_latents(latents).view(num_draws, *seeds.shape[:2], self.unit)
        return tokens, torch.isfinite(latents).all()
