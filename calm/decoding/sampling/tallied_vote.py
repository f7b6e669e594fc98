"""Algorithm 2 with a count of its candidates, for readers who want to see a vote.

Shapes: B sequences, N candidates, L latent size, K tokens of a chunk.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from calm.decoding.sampling.chunk_distribution import ChunkDistribution, decode
from calm.decoding.sampling.methods import Batch
from calm.decoding.sampling.prefix_rejection import CollectedDraws, Prefix

__all__ = ["TalliedBatch", "Tally"]

Tally = Counter[tuple[int, ...]]  # how many candidates are the chunk of these K tokens


@dataclass(frozen=True, kw_only=True)
class TalliedBatch(Batch):
    """`Batch`, which chooses as without a count and then hands on what its candidates were.

    A vote decodes its candidates as far as the choice depends on them; a count decodes all of them
    to the end, and is read by the host. So a chunk costs a decoding of N latents more.

    Attributes:
        receive: takes the tally of each of the B sequences, after every choice. Chunks of equal
            counts are in the order drawn. Of a chunk whose first tokens are given, candidates are
            the draws that begin with them.
    """

    receive: Callable[[list[Tally]], None]
    is_capturable: ClassVar[bool] = False

    def _pick(
        self, distribution: ChunkDistribution, latents: Tensor, seed: Tensor
    ) -> tuple[Tensor, Tensor | int]:
        self._count(distribution, latents, [len(latents)] * len(seed))
        return super()._pick(distribution, latents, seed)

    def _pick_completion(
        self, distribution: ChunkDistribution, found: CollectedDraws, prefix: Prefix, seed: Tensor
    ) -> tuple[Tensor, Tensor]:
        self._count(distribution, found.latents, found.counts.tolist())
        return super()._pick_completion(distribution, found, prefix, seed)

    def _count(self, distribution: ChunkDistribution, latents: Tensor, counts: list[int]) -> None:
        """Tally the first `counts` of the latents ``[N, B, L]`` of each sequence."""
        rows = decode(distribution, latents).transpose(0, 1).tolist()  # [B, N, K]
        chunks = zip(rows, counts, strict=True)
        self.receive([Counter(map(tuple, row[:count])) for row, count in chunks])
