"""A readout of the next chunk's tokens from the hidden state, a training term."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from calm.configuration import CALMConfig
from calm.norm import RMSNorm

__all__ = ["TiedReadout", "TokenReadout"]


class TokenReadout(nn.Module):
    """Hidden states to K slots; the logits of a slot are its products with the token embeddings.

        independent:  logits_j = E W_j h,    j = 1..K
        causal:       x_j = W_j h + Σ_{i<j} B_{j-i} e(token_i)
                      logits_j = E (x_j + V (silu(G n_j) ⊙ U n_j)),    n_j = norm(x_j)

    Independent slots know h alone; slot-causal ones also know the chunk's tokens before them. G, U
    and V, square, are those of all slots. E, with rows e, is the backbone's embedding matrix: with
    ``input_type="latent"`` there is none, and the autoencoder's frozen one has another width and a
    geometry of its own. W, B and V start at zero: all tokens are equally likely, whatever the scale
    of E, and no other weight starts elsewhere than without the readout.

    Probabilities of slot-causal tokens multiply to those of chunks, a distribution that is sampled
    by ``generate(method="readout")`` and whose likelihood is known: such a model is no longer
    likelihood-free, and its autoencoder serves training alone.

    Cost: 6 (K H² + K V H) operations a chunk in training, and no logits in memory
    (`calm_kernels.linear_cross_entropy`): 11 % more a step in the demo (V = 259), and 114 % more in
    CALM-M (V = 128256), where the logits of every token are what chunks are there to avoid.
    Slot-causal: 6 (K (K - 1) / 2 + 3 K) H² more.
    """

    def __init__(self, config: CALMConfig) -> None:
        super().__init__()
        width, self.patch_size = config.hidden_size, config.patch_size
        self.is_causal = config.token_readout == "causal"
        lags = self.patch_size - 1 if self.is_causal else 0
        with torch.random.fork_rng(devices=[]):  # it draws nothing that others would have drawn
            self.slots = nn.Linear(width, self.patch_size * width, bias=False)
            self.earlier = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(lags))
            if self.is_causal:
                self.norm = RMSNorm(width, eps=config.rms_norm_eps)
                self.gate = nn.Linear(width, width, bias=False)
                self.up = nn.Linear(width, width, bias=False)
                self.down = nn.Linear(width, width, bias=False)

    def initialize(self, module: nn.Module) -> None:
        """Give `module`, if it belongs to the readout, its initial weights."""
        last = [self.down] if self.is_causal else []
        if isinstance(module, nn.Linear) and module in (self.slots, *self.earlier, *last):
            init.zeros_(module.weight)

    def forward(self, hidden: Tensor, tokens: Tensor, embedding: nn.Embedding) -> Tensor:
        """What the logits of all slots are products of.

        Args:
            hidden: ``[..., H]``.
            tokens: of the chunks, ``[..., K]``; a causal slot j reads those before it.
            embedding: of the tokens, H wide.

        Returns: ``[..., K, H]``.
        """
        slots = self.slots(hidden).unflatten(-1, (self.patch_size, -1))
        if self.is_causal:
            embedded = embedding(tokens)
            for lag, linear in enumerate(self.earlier, 1):
                slots = slots + F.pad(linear(embedded[..., :-lag, :]), (0, 0, lag, 0))
        return self._finish(slots)

    def slot(self, hidden: Tensor, tokens: Tensor, embedding: nn.Embedding) -> Tensor:
        """As `forward`, of the slot after the tokens ``[..., j]`` alone: ``[..., H]``."""
        index = tokens.shape[-1]
        slot = F.linear(hidden, self.slots.weight.unflatten(0, (self.patch_size, -1))[index])
        for lag, linear in enumerate(self.earlier[:index], 1):
            slot = slot + linear(embedding(tokens[..., index - lag]))
        return self._finish(slot)

    def _finish(self, slots: Tensor) -> Tensor:
        if not self.is_causal:
            return slots
        normed = self.norm(slots)
        return slots + self.down(F.silu(self.gate(normed)) * self.up(normed))


@dataclass(frozen=True)
class TiedReadout:
    """A readout with the embedding that it shares, as a `calm.decoding.sampling.SlotReadout`.

    Attributes:
        readout: of the model.
        embedding: of the model's backbone.
    """

    readout: TokenReadout
    embedding: nn.Embedding

    @property
    def patch_size(self) -> int:
        """See `SlotReadout`."""
        return self.readout.patch_size

    @property
    def vocab_size(self) -> int:
        """See `SlotReadout`."""
        return self.embedding.num_embeddings

    @property
    def is_causal(self) -> bool:
        """See `SlotReadout`."""
        return self.readout.is_causal

    def features(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """See `SlotReadout`."""
        return self.readout(hidden, tokens, self.embedding)

    def slot(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """See `SlotReadout`."""
        return self.readout.slot(hidden, tokens, self.embedding)

    def logits(self, features: Tensor) -> Tensor:
        """See `SlotReadout`."""
        return F.linear(features, self.embedding.weight)
