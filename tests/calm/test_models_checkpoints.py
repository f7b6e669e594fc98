"""Saving and loading: the same files again, nothing from elsewhere, and a frozen autoencoder."""

import copy
import json
import shutil

import pytest
import tiny
import torch
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from calm import Autoencoder, BaselineTransformer, EnergyTransformer
from calm.errors import UserError
from calm.models import MODEL_CLASSES

HEADS = tuple(MODEL_CLASSES)


def baseline(**fields):
    torch.manual_seed(0)
    return BaselineTransformer(
        LlamaConfig(
            vocab_size=tiny.VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            **fields,
        )
    )


BUILDERS = {
    "autoencoder": tiny.autoencoder,
    "baseline": baseline,
    **{head: lambda head=head: tiny.model(head) for head in HEADS},
    "start-latent": lambda: tiny.model(has_start_patch=True, input_type="latent"),
    "both": lambda: tiny.model(input_type="both"),
    "readout": lambda: tiny.model(token_loss_weight=0.3),
    "causal-readout": lambda: tiny.model(token_loss_weight=0.3, token_readout="causal"),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_save_load_save_gives_the_same_files(tmp_path, name):
    model = BUILDERS[name]()
    model.save_pretrained(tmp_path / "first")
    loaded = type(model).from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "second").iterdir())
    assert {"config.json", "model.safetensors"} <= set(files)
    for file in files:
        first, second = ((tmp_path / folder / file).read_bytes() for folder in ("first", "second"))
        assert first == second, file
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


@pytest.mark.parametrize("head", HEADS)
def test_a_checkpoint_needs_no_other_folder(tmp_path, head):
    """Trained from a folder that is then gone; the saved files do not mention it."""
    tiny.autoencoder().save_pretrained(tmp_path / "autoencoder")
    config = tiny.config(ae_path=str(tmp_path / "autoencoder"))
    model = MODEL_CLASSES[head].from_autoencoder(tmp_path / "autoencoder", config)
    model.save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "autoencoder")
    text = (tmp_path / "model" / "config.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["head_type"] == head
    loaded = AutoModel.from_pretrained(tmp_path / "model")
    assert type(loaded) is MODEL_CLASSES[head]
    ids = tiny.tokens()
    assert torch.equal(loaded(ids).last_hidden_state, model.eval()(ids).last_hidden_state)


def test_from_autoencoder_copies_the_weights_and_leaves_its_arguments_alone():
    ae_model, config = tiny.autoencoder(), tiny.config()
    model = EnergyTransformer.from_autoencoder(ae_model, config)
    assert config.ae_config is None
    assert config.head_type is None
    own, copied = ae_model.state_dict(), model.ae_model.state_dict()
    for name in own:
        assert torch.equal(own[name], copied[name])
        assert own[name].data_ptr() != copied[name].data_ptr()
    assert all(parameter.requires_grad for parameter in ae_model.parameters())


def test_building_without_an_autoencoder_says_how_to_pass_one():
    with pytest.raises(ValueError, match=r"no autoencoder.*EnergyTransformer\.from_autoencoder"):
        EnergyTransformer(tiny.config())


# The frozen autoencoder


def is_frozen(model):
    modules = model.ae_model.modules()
    is_evaluating = not any(module.training for module in modules)
    return is_evaluating and not any(p.requires_grad for p in model.ae_model.parameters())


CALLS = {
    "nothing": lambda model: model,
    "train": lambda model: model.train(),
    "eval, train": lambda model: model.eval().train(),
    "requires_grad_": lambda model: model.requires_grad_(True),
    "to": lambda model: model.to(torch.float64).train(),
    "deepcopy": lambda model: copy.deepcopy(model).train(),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_autoencoder_stays_frozen(call):
    model = CALLS[call](tiny.model())
    assert is_frozen(model)
    assert model.transformer.norm.weight.requires_grad


def test_the_autoencoder_is_frozen_after_loading_and_never_trained(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    model = EnergyTransformer.from_pretrained(tmp_path)
    assert is_frozen(model)
    assert is_frozen(model.train())
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    ids = tiny.tokens()
    model(ids, ids, seed=0).loss.backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert not any(name.startswith("ae_model.") for name in changed)
    assert len(changed) == sum(p.requires_grad for p in model.parameters())


# The baseline


def test_the_baseline_is_a_llama_model(tmp_path):
    """Same keys and files as `LlamaForCausalLM`, same loss and gradients, same generation."""
    ours = baseline(pad_token_id=0)
    ours.save_pretrained(tmp_path)
    llama = LlamaForCausalLM.from_pretrained(tmp_path)
    assert ours.state_dict().keys() == llama.state_dict().keys()
    ids = tiny.tokens()
    labels = ids.clone()
    labels[1, 7:] = -100
    loss, expected = ours(ids, labels=labels).loss, llama(ids, labels=labels).loss
    assert torch.allclose(loss, expected, rtol=1e-6)
    loss.backward()
    expected.backward()
    for (name, mine), theirs in zip(ours.named_parameters(), llama.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-4, atol=1e-7), name
    assert torch.equal(ours.eval()(ids).logits, llama.eval()(ids).logits)
    likeliest = ours.generate(ids, max_new_tokens=5, temperature=1e-6)
    assert torch.equal(likeliest, llama.generate(ids, max_new_tokens=5, do_sample=False))


def test_published_baseline_weights_load(tmp_path):
    llama = LlamaForCausalLM(baseline().config)
    llama.save_pretrained(tmp_path)
    loaded, info = BaselineTransformer.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = tiny.tokens()
    assert torch.equal(loaded(ids).logits, llama.eval()(ids).logits)


def test_autoencoder_configuration_of_a_language_model_builds_its_autoencoder():
    model = tiny.model()
    assert Autoencoder(model.config.ae_config).state_dict().keys() == (
        model.ae_model.state_dict().keys()
    )


def test_a_manifest_of_another_program_is_none_of_ours(tmp_path):
    tiny.autoencoder().save_pretrained(tmp_path)
    (tmp_path / "manifest.json").write_text('{"name": "an app", "version": 3}')
    assert Autoencoder.from_pretrained(tmp_path).config.vocab_size == tiny.VOCAB
    (tmp_path / "manifest.json").write_text('{"files": 3}')
    with pytest.raises(UserError, match=r"manifest\.json is unreadable"):
        Autoencoder.from_pretrained(tmp_path)
