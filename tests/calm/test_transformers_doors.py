"""What docs/how-to/transformers.md says of transformers' own doors."""

import inspect

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from calm import CALMConfig, EnergyTransformer


def test_auto_classes_know_a_calm(folders):
    assert type(AutoConfig.from_pretrained(folders / "calm")) is CALMConfig
    assert type(AutoModel.from_pretrained(folders / "calm")) is EnergyTransformer


def test_a_calm_does_not_claim_to_have_logits(folders):
    with pytest.raises(ValueError, match=r"Unrecognized configuration class .*CALMConfig"):
        AutoModelForCausalLM.from_pretrained(folders / "calm")


def test_a_baseline_is_a_llama_to_others(folders):
    assert type(AutoModelForCausalLM.from_pretrained(folders / "baseline")) is LlamaForCausalLM


def test_help_of_generate_shows_its_arguments(folders):
    model = AutoModel.from_pretrained(folders / "calm")
    parameters = inspect.signature(model.generate).parameters
    assert {"input_ids", "temperature", "method", "num_samples", "seed"} <= parameters.keys()
    assert parameters["temperature"].default == 0.5
    assert "num_samples: N, candidates for each chunk" in inspect.getdoc(model.generate)
