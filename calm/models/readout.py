"""A readout of the next chunk's tokens from the hidden state, a training term."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from calm.configuration import CALMConfig

__all__ = ["TokenReadout", "without_readout"]


class TokenReadout(nn.Module):
    """Hidden states to K slots; the logits of a slot are its products with the token embeddings.

        logits_j = E W_j h,    j = 1..K

    The slots are independent given h. E is the backbone's embedding matrix, so that the term adds
    K H² weights alone; with ``input_type="latent"`` there is none, and the autoencoder's frozen one
    has another width and a geometry of its own. W starts at zero: all tokens are equally likely,
    whatever the scale of E, and no other weight starts elsewhere than without the readout.

    Cost: 6 (K H² + K V H) operations a chunk in training, and no logits in memory
    (`calm_kernels.linear_cross_entropy`): 11 % more a step in the demo (V = 259), and 114 % more in
    CALM-M (V = 128256), where the logits of every token are what chunks are there to avoid.
    """

    def __init__(self, config: CALMConfig) -> None:
        super().__init__()
        width, self.patch_size = config.hidden_size, config.patch_size
        with torch.random.fork_rng(devices=[]):  # it draws nothing that others would have drawn
            self.slots = nn.Linear(width, self.patch_size * width, bias=False)

    def initialize(self, module: nn.Module) -> None:
        """Give `module`, if it belongs to the readout, its initial weights."""
        if module is self.slots:
            init.zeros_(module.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., H]`` to slots ``[..., K, H]``."""
        return self.slots(hidden).unflatten(-1, (self.patch_size, -1))


@contextmanager
def without_readout(model: PreTrainedModel) -> Iterator[None]:
    """Meanwhile `model` is saved as one that never had a readout, which generation does not need.

    Not with ``keep_token_readout``. Another model is saved as it is.
    """
    readout, config = getattr(model, "token_readout", None), model.config
    if readout is None or config.keep_token_readout:
        yield
        return
    names = {name for name in model.state_dict() if name.startswith("token_readout.")}
    saved: Any = (model._keys_to_ignore_on_save, config.token_loss_weight)
    model._keys_to_ignore_on_save, config.token_loss_weight = names, 0
    try:
        yield
    finally:
        model._keys_to_ignore_on_save, config.token_loss_weight = saved
