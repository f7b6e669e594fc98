"""A readout: what a frozen model's hidden states say of the next chunk, token by token.

It is trained with the cross-entropy on hidden states that no gradient reaches, so that what it
knows the states hold. Beside a head's draws it shows what the head loses of them. Of K tokens it
either takes each on its own, or each with the chunk's earlier ones (slot-causal), which is then a
distribution over whole chunks.

Shapes: R rows, N draws, K tokens (and slots) of a chunk, H hidden size, E embedding size, V
vocabulary size.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm.decoding.engine.predictors import draw_tokens
from calm.errors import UserError
from calm.evaluation.brier import evaluating
from calm.evaluation.samplers import LOGITS_AT_A_TIME, DrawSampler
from calm.evaluation.scores import Block, TextReader, TextScores
from calm.labels import IGNORE_INDEX
from calm.models.continuous import ContinuousTransformer
from calm.training.muon import MuonAdamW
from calm_kernels import noise
from calm_kernels.linear_cross_entropy import linear_cross_entropy

__all__ = [
    "BITS",
    "FrozenStates",
    "Readout",
    "ReadoutSampler",
    "frozen_states",
    "readout_bits",
    "train_readout",
]

BITS = ("bits",)
EMBEDDING_SIZE = 64  # of the chunk's earlier tokens
NUM_BLOCKS = 2
BATCH = 256  # chunks of a training step
LEARNING_RATE, MUON_RATE, DECAY = 3e-3, 1.2e-2, 0.01
WARMUP = 0.05  # share of the steps
MAX_NORM = 1.0  # of the gradient
BLOCKS_AT_A_TIME = 16  # that the frozen model reads together


@dataclass(frozen=True)
class FrozenStates:
    """Hidden states, and the chunks that follow them.

    Attributes:
        hidden: float32 ``[R, H]``.
        tokens: ``[R, K]``.
        labels: as `tokens`, -100 where a token does not count.
    """

    hidden: Tensor
    tokens: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.hidden)


def frozen_states(model: ContinuousTransformer, blocks: Any, chunks: int) -> FrozenStates:
    """States of `model` before some `chunks` chunks of `blocks`, from all over the text.

    Args:
        model: a CALM.
        blocks: an indexed text, `calm.data.packing.PackedBlocks`; blocks that lie equally far apart
            are read.
        chunks: how many are wanted; whole blocks are read.

    Memory: ``chunks * H`` floats.
    """
    size, device = model.patch_size, model.device
    in_block = blocks.block_size // size - 1
    count = min(len(blocks), math.ceil(chunks / in_block))
    chosen = [blocks[index * len(blocks) // count] for index in range(count)]
    reader = TextReader(chosen, BLOCKS_AT_A_TIME, None, iter)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    with evaluating(model):
        for input_ids, labels, _ in reader:
            inputs = input_ids.to(device)
            hidden = model(inputs[:, :-size]).last_hidden_state.float().flatten(0, 1)
            tokens, wanted = (
                ids.to(device)[:, size:].unflatten(1, (-1, size)).flatten(0, 1)
                for ids in (inputs, labels)
            )
            is_counted = (wanted >= 0).any(-1)
            parts.append((hidden[is_counted], tokens[is_counted], wanted[is_counted]))
    hidden, tokens, wanted = (torch.cat(part) for part in zip(*parts, strict=True))
    return FrozenStates(hidden, tokens, wanted.where(wanted >= 0, IGNORE_INDEX))


class Readout(nn.Module):
    """Logits of the K tokens after a hidden state.

    x_j = A_j h + Σ_{i<j} B_{j-i} e(token_i), the sum of a slot-causal readout alone; then residual
    blocks x + W_2 silu(W_1 norm(x)) and logits U norm(x_j), whose weights all slots share.

    Args:
        hidden_size: H.
        patch_size: K.
        vocab_size: V.
        is_causal: whether slot j sees the chunk's tokens before it.
    """

    def __init__(
        self, hidden_size: int, patch_size: int, vocab_size: int, *, is_causal: bool
    ) -> None:
        super().__init__()
        self.patch_size, self.is_causal = patch_size, is_causal
        self.slots = nn.Linear(hidden_size, patch_size * hidden_size)
        self.embedding = nn.Embedding(vocab_size, EMBEDDING_SIZE)
        self.earlier = nn.ModuleList(
            nn.Linear(EMBEDDING_SIZE, hidden_size, bias=False)
            for _ in range(patch_size - 1 if is_causal else 0)
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.RMSNorm(hidden_size),
                nn.Linear(hidden_size, 3 * hidden_size),
                nn.SiLU(),
                nn.Linear(3 * hidden_size, hidden_size),
            )
            for _ in range(NUM_BLOCKS)
        )
        self.norm = nn.RMSNorm(hidden_size)
        self.output = nn.Linear(hidden_size, vocab_size, bias=False)

    def get_output_embeddings(self) -> nn.Linear:
        """The matrix of the logits, which Muon does not update."""
        return self.output

    def features(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """What logits are made of, of every slot: ``[..., H]`` and ``[..., K]`` to ``[..., K, H]``.

        Slot j of a slot-causal readout reads ``tokens[..., :j]``.
        """
        slots = self.slots(hidden).unflatten(-1, (self.patch_size, -1))
        return self._finish(slots + self._earlier(tokens))

    def slot(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """As `features`, of the slot after the tokens ``[..., j]`` alone: ``[..., H]``."""
        index = tokens.shape[-1]
        weight, bias = (
            part.unflatten(0, (self.patch_size, -1))[index]
            for part in (self.slots.weight, self.slots.bias)
        )
        slot = F.linear(hidden, weight, bias)
        for lag, linear in enumerate(self.earlier[:index], 1):
            slot = slot + linear(self.embedding(tokens[..., index - lag]))
        return self._finish(slot)

    def loss(self, states: FrozenStates) -> Tensor:
        """Mean cross-entropy of the tokens that count, in nats."""
        features = self.features(states.hidden, states.tokens)
        return linear_cross_entropy(features, self.output.weight, states.labels)

    def _earlier(self, tokens: Tensor) -> Tensor:
        """Σ_{i<j} B_{j-i} e(token_i) of every slot, ``[..., K, H]``; 0 of independent slots."""
        embedded = self.embedding(tokens)
        total = embedded.new_zeros(*tokens.shape, self.norm.normalized_shape[0])
        for lag, linear in enumerate(self.earlier, 1):
            total = total + F.pad(linear(embedded[..., :-lag, :]), (0, 0, lag, 0))
        return total

    def _finish(self, slots: Tensor) -> Tensor:
        for block in self.blocks:
            slots = slots + block(slots)
        return self.norm(slots)


def train_readout(
    states: FrozenStates, vocab_size: int, *, is_causal: bool, steps: int, seed: int
) -> Readout:
    """A readout trained on `states` by Muon, with a rate that rises and then falls to 0.

    Args:
        states: of the training text, never of a text that is scored.
        vocab_size: V.
        is_causal: see `Readout`.
        steps: of `BATCH` chunks.
        seed: of weights and batches; torch's own generator is left as it is.

    Raises:
        UserError: no chunk to learn from.
    """
    if not len(states):
        raise UserError("the readout has no text to learn from: no chunk of it counts")
    device = states.hidden.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        width, size = states.hidden.shape[1], states.tokens.shape[1]
        readout = Readout(width, size, vocab_size, is_causal=is_causal).to(device)
        optimizer = MuonAdamW.for_model(
            readout, lr=LEARNING_RATE, muon_lr=MUON_RATE, weight_decay=DECAY
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / (WARMUP * steps), 1 - step / steps)
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.enable_grad():
            for _ in range(steps):
                rows = torch.randint(len(states), (BATCH,), generator=generator).to(device)
                batch = FrozenStates(states.hidden[rows], states.tokens[rows], states.labels[rows])
                readout.loss(batch).backward()
                nn.utils.clip_grad_norm_(readout.parameters(), MAX_NORM)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    return readout.eval().requires_grad_(False)


@dataclass(frozen=True)
class ReadoutSampler(DrawSampler):
    """Draws of a readout: of each slot on its own, or one slot after the other.

    Attributes:
        readout: trained on states of the predictor's model.
    """

    readout: Readout

    def _draw(self, hidden: Tensor, seed: Tensor, target: Tensor | None) -> Tensor:
        """See `DrawSampler`; logits of a few rows at a time."""
        size = max(1, LOGITS_AT_A_TIME // (self.num_draws * self.readout.output.out_features))
        parts = zip(hidden.float().split(size), seed.split(size), strict=True)
        return torch.cat([self._draw_rows(*part) for part in parts], dim=1)

    def _draw_rows(self, hidden: Tensor, seed: Tensor) -> Tensor:
        readout, rows = self.readout, len(hidden)
        uniforms = noise.uniform(
            rows, readout.patch_size, stream=noise.Stream.HEAD, seed=seed,
            num_draws=self.num_draws, device=hidden.device, dtype=torch.float64,
        )  # fmt: skip
        tokens = torch.empty(self.num_draws, rows, 0, dtype=torch.int64, device=hidden.device)
        for slot in range(readout.patch_size):
            known = tokens if readout.is_causal else tokens[:1]  # all draws see the same
            features = readout.slot(hidden, known)
            chances = readout.output(features).softmax(-1).expand(self.num_draws, rows, -1)
            drawn = draw_tokens(chances.flatten(0, 1), uniforms[..., slot].reshape(-1, 1))
            tokens = torch.cat([tokens, drawn.view(self.num_draws, rows, 1)], dim=-1)
        return tokens


def readout_bits(
    model: ContinuousTransformer,
    readout: Readout,
    blocks: Iterable[Block],
    *,
    batch_size: int = 4,
    progress: Callable[[Iterator[Any]], Iterable[Any]] = iter,
    describe: Mapping[str, Any] | None = None,
) -> TextScores:
    """-log2 P(chunk) of a readout at every predicted chunk all of whose tokens count.

    Args:
        model: whose hidden states the readout reads.
        readout: trained on them.
        blocks: as `calm.evaluation.scores.score_text`, and what follows.
        batch_size: likewise.
        progress: likewise.
        describe: likewise.

    Returns: one score, ``bits`` of K tokens.
    """
    size, device = model.patch_size, model.device
    reader = TextReader(blocks, batch_size, None, progress)
    with evaluating(model):
        for input_ids, labels, _ in reader:
            hidden = model(input_ids[:, :-size].to(device)).last_hidden_state.float()
            wanted = labels[:, size:].to(device).unflatten(1, (-1, size))
            tokens = wanted.clamp(min=0)
            nats = _cross_entropy(readout, readout.features(hidden, tokens), tokens)
            bits = nats.double().sum(-1, keepdim=True) / math.log(2)
            reader.add(bits, (wanted >= 0).all(-1), size + size * torch.arange(wanted.shape[1]))
    settings = {"positions_are": f"every predicted chunk of {size} tokens that all count"}
    return reader.scores(model, BITS, describe or {}, settings)


def _cross_entropy(readout: Readout, features: Tensor, tokens: Tensor) -> Tensor:
    """Of each token ``[...]`` given ``[..., H]``; logits of a few rows at a time."""
    size = max(1, LOGITS_AT_A_TIME // readout.output.out_features)
    wanted = tokens.flatten()
    parts = [
        F.cross_entropy(readout.output(part), target, reduction="none")
        for part, target in zip(
            features.flatten(0, -2).split(size), wanted.split(size), strict=True
        )
    ]
    return torch.cat(parts).view(tokens.shape)
