"""Traps of transformers' model and configuration classes (the Trainer's: `test_traps_trainer.py`).

Traps 2, 9, 10 and 11 are also covered where models are saved and loaded and old files are read.
"""

import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from calm import Autoencoder, CALMConfig, EnergyTransformer
from calm.models import MODEL_CLASSES


def drop_weights(folder, *names):
    """Remove weights from a saved model."""
    weights = load_file(folder / "model.safetensors")
    for name in names:
        del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_output_matrix_of_the_autoencoder_survives_a_reload(tmp_path):
    """Trap 4: with tied names the reloaded output matrix is random; here it exists once."""
    model = tiny.autoencoder()
    model.save_pretrained(tmp_path)
    loaded, info = Autoencoder.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert loaded.decoder.output_weight is loaded.encoder.embed_tokens.weight
    assert torch.equal(loaded.decoder.output_weight, model.decoder.output_weight)
    assert [name for name in loaded.state_dict() if "lm_head" in name] == []
    latents = torch.randn(1, 2, tiny.LATENT)
    expected = model.decoder(latent_states=latents)
    assert torch.equal(loaded.decoder(latent_states=latents), expected)


@pytest.mark.parametrize("head", MODEL_CLASSES)
def test_what_is_not_stored_is_rebuilt_on_loading(tmp_path, head):
    """Trap 5: models are built without memory; buffers that no file holds came back as garbage."""
    model = tiny.model(head)
    model.save_pretrained(tmp_path)
    loaded = MODEL_CLASSES[head].from_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors").keys()
    buffers = dict(loaded.named_buffers())
    assert {name.split(".")[-1] for name in buffers} <= {"inv_freq", "original_inv_freq"}
    assert not buffers.keys() & stored
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    hidden = torch.randn(4, 16)
    assert torch.equal(
        loaded.generative_head.sample(hidden, seed=0), model.generative_head.sample(hidden, seed=0)
    )


@pytest.mark.parametrize("head_init", ["zero", "scaled"])
def test_weights_that_a_file_lacks_start_as_they_should(tmp_path, head_init):
    """Trap 5: a last layer set to zero after construction is random if the file lacks it."""
    model = tiny.model(head_init=head_init, initializer_range=0.02)
    model.save_pretrained(tmp_path)
    last = "mlp_generator.final_layer.linears.2"
    drop_weights(tmp_path, f"{last}.weight", f"{last}.bias")
    loaded, info = EnergyTransformer.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {f"{last}.weight", f"{last}.bias"}
    output = loaded.generative_head.output
    assert output.bias.abs().max() == 0
    expected = 0 if head_init == "zero" else 16**-0.5
    assert output.weight.std().item() == pytest.approx(expected, rel=0.3)
    kept = loaded.generative_head.hidden_embd.weight
    assert torch.equal(kept, model.generative_head.hidden_embd.weight)


def test_derived_fields_follow_their_sources():
    """Trap 6: changed in place, a configuration keeps the head width of the old one."""
    config = CALMConfig(hidden_size=128, num_attention_heads=4)
    assert (config.head_dim, config.num_key_value_heads) == (32, 4)


def test_a_model_reloads_after_its_autoencoder_is_gone(tmp_path):
    """Trap 9: loading the autoencoder in ``__init__`` raises on reload."""
    tiny.autoencoder().save_pretrained(tmp_path / "ae")
    config = tiny.config(ae_path=str(tmp_path / "ae"))
    model = EnergyTransformer.from_autoencoder(tmp_path / "ae", config)
    model.save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "ae")
    loaded = EnergyTransformer.from_pretrained(tmp_path / "model")
    for name, value in model.ae_model.state_dict().items():
        assert torch.equal(loaded.ae_model.state_dict()[name], value), name


def test_an_alias_is_no_second_module():
    """Trap 10: both names in the state dict, and saving raises."""
    model = tiny.model()
    assert model.generative_head is model.mlp_generator
    assert not any(name.startswith("generative_head") for name in model.state_dict())


@pytest.mark.parametrize("head", MODEL_CLASSES)
def test_the_model_type_is_saved(tmp_path, head):
    """Trap 11: an instance's model type is saved as null, and the Auto classes fail."""
    tiny.model(head).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "calm"
    assert isinstance(AutoConfig.from_pretrained(tmp_path), CALMConfig)
    assert type(AutoModel.from_pretrained(tmp_path)) is MODEL_CLASSES[head]
    tiny.autoencoder().save_pretrained(tmp_path / "ae")
    assert type(AutoModel.from_pretrained(tmp_path / "ae")) is Autoencoder


def dtypes(model):
    return {parameter.dtype for parameter in model.parameters()}


def test_the_dtype_is_that_of_the_file_or_of_the_caller(tmp_path):
    """Trap 12: and training casts nothing."""
    tiny.model().bfloat16().save_pretrained(tmp_path)
    assert dtypes(EnergyTransformer.from_pretrained(tmp_path)) == {torch.bfloat16}
    model = EnergyTransformer.from_pretrained(tmp_path, dtype=torch.float32)
    assert dtypes(model) == {torch.float32}
    ids = tiny.tokens()
    model.train()(ids, ids).loss.backward()
    assert dtypes(model) == {torch.float32}
    half = EnergyTransformer.from_pretrained(tmp_path).train()
    loss = half(ids, ids, seed=0).loss
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, model(ids, ids, seed=0).loss, rtol=0.1)


@pytest.mark.parametrize("head", MODEL_CLASSES)
def test_the_attention_implementation_can_be_set(tmp_path, head):
    """Trap 13: a part without attention, the autoencoder, made it raise."""
    model = tiny.model(head).eval()
    assert model.config._attn_implementation == "sdpa"
    expected = model(tiny.tokens()).last_hidden_state
    model.set_attn_implementation("eager")
    assert model.transformer.config._attn_implementation == "eager"
    assert torch.allclose(model(tiny.tokens()).last_hidden_state, expected, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = MODEL_CLASSES[head].from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.allclose(loaded(tiny.tokens()).last_hidden_state, expected, atol=1e-5)
