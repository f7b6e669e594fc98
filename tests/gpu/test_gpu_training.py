"""A training step on a GPU: the host never waits for the device."""

import pytest
import torch
from transformers import LlamaConfig

from calm import AutoencoderConfig, BaselineTransformer, CALMConfig
from calm.models import MODEL_CLASSES, Autoencoder
from calm_kernels.noise import as_seed

VOCAB = 500
BACKBONE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "vocab_size": VOCAB, "pad_token_id": 0,
}  # fmt: skip


def make_model(kind):
    torch.manual_seed(0)
    autoencoder = AutoencoderConfig(
        vocab_size=VOCAB, latent_size=16, hidden_size=32, intermediate_size=48
    )
    if kind == "autoencoder":
        return Autoencoder(autoencoder).cuda()
    if kind == "baseline":
        return BaselineTransformer(LlamaConfig(**BACKBONE)).cuda()
    config = CALMConfig(
        **BACKBONE, latent_size=16, noise_size=16, num_mlp_layers=2, ae_config=autoencoder
    )
    return MODEL_CLASSES[kind](config).cuda()


@pytest.mark.parametrize("kind", [*MODEL_CLASSES, "baseline", "autoencoder"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_training_step_does_not_wait_for_the_device(kind, backend, monkeypatch):
    """Under autocast, as recipes train; the first step compiles kernels and fills caches."""
    monkeypatch.setenv("CALM_KERNELS_BACKEND", backend)
    model = make_model(kind).train()
    ids = torch.randint(1, VOCAB, (2, 64), device="cuda")
    draws = {} if kind == "baseline" else {"seed": as_seed(7, "cuda")}

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, labels=ids, **draws).loss
        loss.backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
