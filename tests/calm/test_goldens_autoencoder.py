"""The autoencoder computes what the published code computes."""

import pytest
import torch
from golden_cases import (
    AUTOENCODERS,
    GOLDENS,
    assert_close,
    assert_gradients,
    tensors,
)
from safetensors.torch import save_file

from calm import Autoencoder


@pytest.fixture(params=AUTOENCODERS)
def case(request):
    model, info = Autoencoder.from_pretrained(GOLDENS / request.param, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model, tensors(request.param)


def test_encoder(case):
    model, recorded = case
    assert_close(model.encoder(input_ids=recorded["input_ids"]), recorded["eval.latent_states"])


def test_decoder(case):
    model, recorded = case
    logits = model.decoder(latent_states=recorded["decoder.latents"])
    assert_close(logits, recorded["decoder.logits"])
    tokens = model.decoder.tokens(model.decoder.decode(recorded["decoder.latents"]))
    assert torch.equal(tokens.flatten(1), recorded["decoder.logits"].argmax(-1))


def test_evaluation(case):
    model, recorded = case
    ids, noise = recorded["input_ids"], recorded["eval.d000_randn"]
    assert_close(model(ids, latent_noise=noise).logits.flatten(0, 1), recorded["eval.logits"])
    output = model(ids, ids, latent_noise=noise)
    assert_close(output.loss, recorded["eval.loss"])
    right = recorded["eval.logits"].argmax(-1).view(ids.shape) == ids
    assert torch.allclose(output.accuracy, right.float().mean(1))


def test_training_loss_and_every_gradient(case):
    model, recorded = case
    model.train()
    ids = recorded["input_ids"]
    output = model(
        ids,
        ids,
        token_keep=recorded["train.d000_rand"] > model.config.ae_dropout,
        latent_noise=recorded["train.d001_randn"],
        latent_keep=recorded["train.d002_keep"].bool(),
    )
    assert_close(output.loss, recorded["train.loss"])
    output.loss.backward()
    assert_gradients(model, recorded, expected_count=27)


@pytest.mark.parametrize("kept", ["encoder.embed_tokens.weight", "decoder.lm_head_weight", "both"])
@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_either_name_of_the_embedding_loads(tmp_path, form, kept):
    """A published .bin holds both names of the matrix, a safetensors file may hold either."""
    source = GOLDENS / "autoencoder-k4"
    weights = torch.load(source / "pytorch_model.bin", weights_only=True)
    names = {"encoder.embed_tokens.weight", "decoder.lm_head_weight"}
    assert names <= weights.keys()
    for name in names - {kept} if kept != "both" else ():
        del weights[name]
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    if form == "bin":
        torch.save(weights, tmp_path / "pytorch_model.bin")
    else:
        copies = {name: tensor.clone() for name, tensor in weights.items()}
        save_file(copies, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, info = Autoencoder.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    recorded = tensors("autoencoder-k4")
    logits = model.decoder(latent_states=recorded["decoder.latents"])
    assert_close(logits, recorded["decoder.logits"])
