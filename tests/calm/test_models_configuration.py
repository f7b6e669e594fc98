"""Configurations: checks across fields, old files, and how the autoencoder is found."""

import json
import logging
import shutil

import pytest
import tiny
import torch
from golden_cases import GOLDENS
from transformers import AutoConfig, LlamaConfig

from calm import (
    Autoencoder,
    AutoencoderConfig,
    BaselineTransformer,
    CALMConfig,
    EnergyTransformer,
    FlowTransformer,
)
from calm.configuration import locate_autoencoder
from calm.errors import UserError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 2.0}, r"beta must lie in \(0, 2\).*2\.0"),
        ({"beta": 0}, r"beta must lie in \(0, 2\)"),
        ({"beta": "one"}, "'beta'.*'one'"),
        ({"num_samples": 1, "head_type": "energy"}, "num_samples must be at least 2.*got 1"),
        ({"num_samples": 0, "head_type": "flow"}, "num_samples must be at least 1"),
        ({"hidden_size": 100, "num_attention_heads": 16}, "100.*not a multiple.*16"),
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"targets": "antithetic", "num_targets": 25}, "num_targets must be even.*25"),
        ({"targets": "exact"}, "'targets' expected one of .*'analytic'.*got exact"),
        ({"input_type": "text"}, "'input_type' expected one of"),
        ({"head_type": "gan"}, "gan"),
        ({"hidden_act": "nope"}, "hidden_act must be an activation of transformers.*'nope'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads, 16.*3"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        ({"embedding_std": float("nan")}, "embedding_std must be a finite number, got nan"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"token_loss_weight": -0.1}, "token_loss_weight must be at least 0, got -0.1"),
        (
            {"token_loss_weight": 1, "input_type": "latent"},
            "weight must be 0 for input_type",
        ),
        ({"token_readout": "joint"}, "'token_readout' expected one of"),
        ({"token_score_weight": -1}, "token_score_weight must be at least 0, got -1"),
        ({"token_score_start": 1.5}, r"token_score_start must lie in \[0, 1\], got 1.5"),
        ({"token_score_weight": 1, "head_type": "flow"}, "token_score_weight .* flow head.*got 1"),
        (
            {"token_score_weight": 1, "token_score_samples": 1},
            "token_score_samples must lie between 2 and num_samples, 8, got 1",
        ),
        ({"token_score_weight": 1, "token_score_samples": 9}, "num_samples, 8, got 9"),
    ],
    ids=str,
)
def test_bad_language_model_fields(fields, message):
    with pytest.raises(UserError, match=f"(?s)CALMConfig: .*{message}"):
        CALMConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_encoder_layers": 3}, "num_encoder_layers must be even.*got 3"),
        ({"num_decoder_layers": 0}, "num_decoder_layers must be even"),
        ({"ae_dropout": 1.0}, r"ae_dropout must lie in \[0, 1\)"),
        ({"token_dropout": -0.1}, r"token_dropout must lie in \[0, 1\), got -0.1"),
        ({"latent_dropout": 1}, r"latent_dropout must lie in \[0, 1\), got 1"),
        ({"kl_weight": -1}, "kl_weight must be at least 0"),
        ({"kl_clamp": -0.5}, "kl_clamp must be at least 0"),
        ({"latent_size": 0}, "latent_size must be at least 1"),
        ({"vocab_size": 12.5}, "vocab_size"),
        ({"hidden_act": "nope"}, "hidden_act must be"),
        ({"kl_weight": float("inf")}, "kl_weight must be a finite number, got inf"),
        ({"embedding_std": -0.1}, "embedding_std must be >= 0"),
    ],
    ids=str,
)
def test_bad_autoencoder_fields(fields, message):
    with pytest.raises(UserError, match=f"AutoencoderConfig: .*{message}"):
        AutoencoderConfig(**fields)


@pytest.mark.parametrize("field", ["vocab_size", "patch_size", "latent_size"])
def test_a_language_model_and_an_autoencoder_that_disagree(field):
    other = getattr(tiny.autoencoder_config(), field) + 2
    ae_model = Autoencoder(tiny.autoencoder_config(**{field: other}))
    with pytest.raises(UserError, match=rf"{field} of the language model.*set {field}={other}"):
        EnergyTransformer.from_autoencoder(ae_model, tiny.config())
    with pytest.raises(UserError, match=field):
        tiny.config(ae_config=ae_model.config)


def test_the_energy_model_needs_two_draws_even_where_the_file_names_no_head():
    config = tiny.config(num_samples=1)  # no head type yet
    assert FlowTransformer.from_autoencoder(tiny.autoencoder(), config).config.num_samples == 1
    with pytest.raises(UserError, match="num_samples must be at least 2"):
        EnergyTransformer.from_autoencoder(tiny.autoencoder(), config)


@pytest.mark.parametrize("fields", [{"hidden_act": "nope"}, {"num_key_value_heads": 3}], ids=str)
def test_a_baseline_checks_its_backbone(fields):
    config = LlamaConfig(hidden_size=16, num_attention_heads=4, num_hidden_layers=1, **fields)
    with pytest.raises(UserError, match=next(iter(fields))):
        BaselineTransformer(config)


def test_published_defaults():
    autoencoder, model = AutoencoderConfig(), CALMConfig()
    assert (autoencoder.hidden_size, autoencoder.intermediate_size) == (512, 1280)
    assert (autoencoder.num_encoder_layers, autoencoder.num_decoder_layers) == (2, 2)
    assert (autoencoder.ae_dropout, autoencoder.kl_clamp, autoencoder.kl_weight) == (
        0.15,
        0.5,
        1e-3,
    )
    assert (model.noise_size, model.num_mlp_layers, model.num_samples) == (64, 4, 8)
    assert (model.beta, model.head_init, model.input_type) == (1.0, "zero", "tokens")
    for name in ("vocab_size", "patch_size", "latent_size"):
        assert getattr(autoencoder, name) == getattr(model, name)
    assert (model.vocab_size, model.patch_size, model.latent_size) == (128256, 4, 128)


# Old files


def write_config(folder, **fields):
    published = json.loads((GOLDENS / "energy-k4" / "config.json").read_text())
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**published, **fields}))
    return folder


@pytest.mark.parametrize("head_type", ["energy", "diffusion", "flow"])
def test_an_old_model_type_is_read_as_head_type_with_one_warning(
    tmp_path, caplog, monkeypatch, head_type
):
    folder = write_config(tmp_path, model_type=head_type)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        config = CALMConfig.from_pretrained(folder)
    assert [record.getMessage() for record in caplog.records] == [
        f"model_type '{head_type}' is read as head_type; saving writes a current file"
    ]
    assert config.head_type == head_type
    assert config.model_type == "calm"
    config.save_pretrained(tmp_path / "current")
    current = AutoConfig.from_pretrained(tmp_path / "current")
    assert isinstance(current, CALMConfig)
    assert current.head_type == head_type


def test_an_old_file_without_newer_fields(tmp_path):
    folder = write_config(tmp_path, rope_theta=5000.0)
    fields = json.loads((folder / "config.json").read_text())
    del fields["num_samples"], fields["num_mlp_layers"]
    (folder / "config.json").write_text(json.dumps(fields))
    config = CALMConfig.from_pretrained(folder)
    assert config.rope_parameters["rope_theta"] == 5000.0
    assert (config.num_samples, config.num_mlp_layers, config.targets) == (8, 4, "analytic")
    assert config.head_type is None


def test_a_class_refuses_a_configuration_with_another_head():
    config = tiny.config(head_type="flow", ae_config=tiny.autoencoder_config())
    with pytest.raises(
        UserError, match=r"EnergyTransformer has head_type 'energy'.*FlowTransformer"
    ):
        EnergyTransformer(config)


# Finding the autoencoder


def test_ae_path_is_taken_as_given_then_relative_to_the_checkpoint(tmp_path, monkeypatch):
    shutil.copytree(GOLDENS / "autoencoder-k4", tmp_path / "here" / "is" / "ae")
    checkpoint = write_config(tmp_path / "here" / "model", ae_path="../is/ae")
    assert CALMConfig.from_pretrained(checkpoint).ae_config.hidden_size == 24
    checkpoint = write_config(tmp_path / "here" / "model", ae_path="here/is/ae")
    assert CALMConfig.from_pretrained(checkpoint).ae_config is None
    monkeypatch.chdir(tmp_path)
    assert CALMConfig.from_pretrained(checkpoint).ae_config.hidden_size == 24


def test_a_file_in_a_folder_leads_to_no_hub(tmp_path, monkeypatch):
    """A hub is asked only where the user's own words name it."""
    asked = []

    def from_pretrained(name, **options):
        asked.append(name)
        raise OSError("no such repository")

    checkpoint = write_config(tmp_path, ae_path="someone/autoencoder")
    shutil.copy(GOLDENS / "energy-k4" / "pytorch_model.bin", checkpoint)
    monkeypatch.setattr(AutoencoderConfig, "from_pretrained", from_pretrained)
    assert CALMConfig.from_pretrained(checkpoint).ae_config is None and not asked
    with pytest.raises(UserError, match=r"no autoencoder.*someone/autoencoder"):
        EnergyTransformer.from_pretrained(checkpoint)
    assert not asked
    CALMConfig.from_pretrained(checkpoint, ae_path="someone/other")
    assert asked == ["someone/other"]
    assert locate_autoencoder("someone/ae", "someone/model") == "someone/ae"


def test_nothing_leads_to_an_autoencoder(tmp_path):
    checkpoint = write_config(tmp_path, ae_path="/nowhere/autoencoder")
    shutil.copy(GOLDENS / "energy-k4" / "pytorch_model.bin", checkpoint)
    with pytest.raises(UserError, match=r"no autoencoder.*/nowhere/autoencoder.*pass ae_path="):
        EnergyTransformer.from_pretrained(checkpoint)
    model = EnergyTransformer.from_pretrained(checkpoint, ae_path=str(GOLDENS / "autoencoder-k4"))
    assert model.config.ae_config.patch_size == 4
    config = CALMConfig.from_pretrained(checkpoint)
    config.ae_path = str(GOLDENS / "autoencoder-k4")
    assert EnergyTransformer.from_pretrained(checkpoint, config=config).config.ae_config
    assert config.ae_config is None


def test_an_autoencoder_of_another_shape_at_ae_path(tmp_path):
    checkpoint = write_config(tmp_path, ae_path=str(GOLDENS / "autoencoder-k2"))
    with pytest.raises(UserError, match="patch_size of the language model, 4, differs"):
        EnergyTransformer.from_pretrained(checkpoint)


def test_a_file_without_weights_of_the_autoencoder_takes_them_from_ae_path(tmp_path):
    checkpoint = write_config(tmp_path, ae_path=str(GOLDENS / "autoencoder-k4"))
    weights = torch.load(GOLDENS / "energy-k4" / "pytorch_model.bin", weights_only=True)
    kept = {name: value for name, value in weights.items() if not name.startswith("ae_model.")}
    torch.save(kept, checkpoint / "pytorch_model.bin")
    model, info = EnergyTransformer.from_pretrained(checkpoint, output_loading_info=True)
    assert not info["missing_keys"]
    trained = Autoencoder.from_pretrained(GOLDENS / "autoencoder-k4").state_dict()
    for name, value in model.ae_model.state_dict().items():
        assert torch.equal(value, trained[name]), name
    assert not any(parameter.requires_grad for parameter in model.ae_model.parameters())

    write_config(tmp_path, ae_path="/nowhere", ae_config=json.loads(
        (GOLDENS / "autoencoder-k4" / "config.json").read_text()))  # fmt: skip
    with pytest.raises(UserError, match=r"lacks weights of its autoencoder.*pass ae_path="):
        EnergyTransformer.from_pretrained(checkpoint)
