"""A readout: what a frozen model's hidden states say of the next chunk, token by token.

It is trained with the cross-entropy on hidden states that no gradient reaches, so that what it
knows the states hold. Beside a head's draws it shows what the head loses of them. Of K tokens it
either takes each on its own, or each with the chunk's earlier ones (slot-causal), which is then a
distribution over whole chunks.

Shapes: R rows, N draws, K tokens (and slots) of a chunk, H hidden size, E embedding size, V
vocabulary size.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm.errors import UserError
from calm.evaluation.brier import evaluating
from calm.evaluation.scores import TextReader
from calm.labels import IGNORE_INDEX
from calm.models.continuous import ContinuousTransformer
from calm.training.muon import MuonAdamW
from calm_kernels.linear_cross_entropy import linear_cross_entropy

__all__ = ["FrozenStates", "Readout", "frozen_states", "train_readout"]

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
    """Logits of the K tokens after a hidden state, a `SlotReadout`.

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
        self.patch_size, self.vocab_size, self.is_causal = patch_size, vocab_size, is_causal
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
        """See `SlotReadout`; slot j of a slot-causal readout reads ``tokens[..., :j]``."""
        slots = self.slots(hidden.float()).unflatten(-1, (self.patch_size, -1))
        return self._finish(slots + self._earlier(tokens))

    def slot(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """See `SlotReadout`."""
        index = tokens.shape[-1]
        weight, bias = (
            part.unflatten(0, (self.patch_size, -1))[index]
            for part in (self.slots.weight, self.slots.bias)
        )
        slot = F.linear(hidden.float(), weight, bias)
        for lag, linear in enumerate(self.earlier[:index], 1):
            slot = slot + linear(self.embedding(tokens[..., index - lag]))
        return self._finish(slot)

    def logits(self, features: Tensor) -> Tensor:
        """See `SlotReadout`."""
        return self.output(features)

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
