"""Random models small enough to enumerate what they say, and what tests feed them."""

import torch
from transformers import LlamaConfig

from calm import AutoencoderConfig, BaselineTransformer, CALMConfig
from calm.decoding import generate
from calm.models import MODEL_CLASSES

BACKBONE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer": "fan_in",
    "embedding_std": 1.0,
    "pad_token_id": None,
    "eos_token_id": None,
    "bos_token_id": None,
}


def tiny_calm(head="energy", *, patch_size=4, vocab_size=5, seed=0, **fields):
    """A CALM whose draws are varied and whose chunks depend on the context."""
    torch.manual_seed(seed)
    autoencoder = AutoencoderConfig(
        vocab_size=vocab_size,
        patch_size=patch_size,
        latent_size=8,
        hidden_size=16,
        intermediate_size=24,
        initializer="fan_in",
        embedding_std=1.0,
    )
    config = CALMConfig(
        **{**BACKBONE, **fields},
        vocab_size=vocab_size,
        patch_size=patch_size,
        latent_size=8,
        noise_size=12,
        num_mlp_layers=1,
        head_init="scaled",
        ae_config=autoencoder,
    )
    model = MODEL_CLASSES[head](config).eval()
    if head == "energy":  # at this width the context hardly reaches an untrained head's output
        with torch.no_grad():
            for parameter in model.mlp_generator.mlp_blocks.parameters():
                parameter.mul_(3.0)
    return model


READOUT = {"token_loss_weight": 1.0, "keep_token_readout": True}


def calm_with_readout(kind="causal", *, vocab_size=3, **fields):
    """One whose readout is far from uniform."""
    model = tiny_calm(vocab_size=vocab_size, token_readout=kind, **READOUT, **fields)
    torch.manual_seed(1)
    for weight in model.token_readout.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.25 / weight.shape[1] ** 0.5)
    return model


def tiny_baseline(*, vocab_size=3, seed=0, **fields):
    """A token-by-token model whose distribution is far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(**{**BACKBONE, **fields}, vocab_size=vocab_size)
    model = BaselineTransformer(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    return model


def prompt(*shape, vocab_size=5, seed=3):
    """Random token ids of this shape."""
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def likely_prompt(model, batch, length):
    """Text of the model's own: an unfinished chunk at its end has a continuation."""
    ids = prompt(batch, 8).tolist()
    return generate(model, ids, max_length=40, temperature=1.0, seed=1)[:, :length]


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.received, self.has_ended = [], False

    def put(self, value):
        self.received.append(value)

    def end(self):
        self.has_ended = True
