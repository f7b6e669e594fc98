"""Heads that compute their blocks again in the backward pass: fewer saved bytes, the same bits."""

import pytest
import tiny
import torch

from calm import CALMConfig
from calm.models import MODEL_CLASSES
from calm.models.heads.base import is_recomputed
from calm.training.checkpoints.resume import model_settings
from calm.training.flags.config_overrides import build_config

ignores_renaming = pytest.mark.filterwarnings("ignore:.*activation_checkpointing")


def step(model):
    """Bytes that a training step saves, its loss and its gradients."""
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = tiny.tokens(chunks=9)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.train()(ids, labels=ids, seed=7).loss
    saved = sum(size for size, _ in storages.values())
    loss.backward()
    gradients = [weight.grad for weight in model.parameters() if weight.requires_grad]
    return saved, loss, gradients


def assert_same_step(plain, other):
    assert torch.equal(plain[1], other[1])
    for ours, theirs in zip(plain[2], other[2], strict=True):
        assert torch.equal(ours, theirs)


@ignores_renaming
@pytest.mark.parametrize("head", MODEL_CLASSES)
def test_a_training_step_saves_less_and_is_the_same(head):
    sizes = {"num_samples": 8, "num_mlp_layers": 3}
    plain = step(tiny.model(head, **sizes))
    asked = step(tiny.model(head, head_recompute=True, **sizes))
    model = tiny.model(head, **sizes)
    model.gradient_checkpointing_enable()
    whole = step(model)
    assert_same_step(plain, asked)
    assert_same_step(plain, whole)
    assert whole[0] < asked[0] < 0.7 * plain[0]


@ignores_renaming
def test_checkpointing_ends_and_evaluation_has_none():
    model = tiny.model("energy")
    head = model.generative_head
    model.gradient_checkpointing_enable()
    assert is_recomputed(head.train(), False)
    assert not is_recomputed(head.eval(), True)
    model.gradient_checkpointing_disable()
    assert not is_recomputed(head.train(), False) and is_recomputed(head, True)


@pytest.mark.parametrize("head", MODEL_CLASSES)
def test_draws_are_the_same(head):
    hidden = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    models = [tiny.model(head, head_recompute=flag).train() for flag in (False, True)]
    first, second = (m.generative_head.sample(hidden, num_samples=2, seed=1) for m in models)
    assert torch.equal(first, second)


def test_the_flag_changes_no_run():
    """It is reached by ``config_overrides``, and a run may go on with or without it."""
    settings = []
    for value in ("false", "true"):
        config = build_config(CALMConfig, {"head_recompute": value}, tiny.config())
        model = MODEL_CLASSES["energy"].from_autoencoder(tiny.autoencoder(), config)
        assert model.config.head_recompute == (value == "true")
        settings.append(model_settings(model))
    assert settings[0] == settings[1]
