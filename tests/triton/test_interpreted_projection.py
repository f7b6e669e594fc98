"""The vocabulary's kernels inside the models: which a step launches, and that it is torch's."""

import pytest
import torch
from model_cases import Launches, tiny_autoencoder, tiny_model
from transformers import LlamaConfig

from calm import BaselineTransformer
from calm_kernels import use_backend
from calm_kernels.linear_argmax import kernels as argmax_kernels
from calm_kernels.linear_cross_entropy import kernels as loss_kernels

ARGMAX = ["partial_kernel", "reduce_kernel"]


@pytest.fixture
def launches(monkeypatch):
    return Launches(monkeypatch, argmax_kernels, loss_kernels)


def tiny_baseline():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return BaselineTransformer(config)


def step(model, backend, **options):
    """Loss of a step and the gradient of every parameter."""
    tokens = torch.arange(16).view(2, 8) * 5 % 64
    labels = tokens.clone()
    labels[1, 6:] = -100
    model.zero_grad()
    with use_backend(backend):
        loss = model(input_ids=tokens, labels=labels, **options).loss
    if loss.requires_grad:
        loss.backward()
    return [loss.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]]


def assert_same(actual, expected):
    assert len(actual) == len(expected) > 1
    for value, wanted in zip(actual, expected, strict=True):
        # Sums in another order through a whole model; small gradients are what is left of larger
        # ones, of some 0.1: 8 eps of those.
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "options"),
    [(tiny_autoencoder, {"seed": 3}), (tiny_baseline, {})],
    ids=["autoencoder", "baseline"],
)
def test_a_training_step(make, options, launches):
    model = make().train()
    expected = step(model, "torch", **options)
    assert not launches.names
    actual = step(model, "auto", **options)
    assert launches.names == ["loss_kernel"]
    assert_same(actual, expected)


def test_the_gradient_of_tied_weights_is_the_sum_of_both(launches):
    """The autoencoder's embedding is its output layer, too."""
    model = tiny_autoencoder().train()
    step(model, "auto", seed=3)
    gradient = model.encoder.embed_tokens.weight.grad
    unseen = torch.tensor([token for token in range(64) if token % 5])
    assert gradient[unseen].abs().sum() > 0  # through the output layer alone


def test_an_evaluation_of_the_autoencoder(launches):
    model = tiny_autoencoder().eval()
    tokens = torch.arange(16).view(2, 8)
    results = []
    for backend in ("torch", "auto"):
        with use_backend(backend), torch.no_grad():
            results.append(model(tokens, labels=tokens, seed=1))
    assert launches.names == ["loss_kernel", *ARGMAX]
    torch.testing.assert_close(results[0].loss, results[1].loss)
    assert torch.equal(results[0].accuracy, results[1].accuracy)


def test_decoding_latents(launches):
    model = tiny_model().eval()
    latents = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(4))
    tokens = []
    for backend in ("torch", "auto"):
        with use_backend(backend), torch.no_grad():
            tokens.append(model.decode_latents(latents))
    assert launches.names == ARGMAX
    assert torch.equal(*tokens)
