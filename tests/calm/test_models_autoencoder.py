"""The autoencoder beyond the published numbers: its loss term by term, dropout, copies."""

import copy

import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy


def test_autoencoder_loss_is_its_formula():
    model = tiny.autoencoder(initializer_range=0.2, ae_dropout=0.0, kl_weight=0.3, kl_clamp=0.01)
    ids = tiny.tokens()
    labels = ids.clone()
    labels[0, :4] = -100
    noise = torch.randn(15, tiny.LATENT)
    mean, log_std = model.encoder(input_ids=ids).chunk(2, dim=-1)
    std = log_std.exp()
    logits = model.decoder(latent_states=mean + std * noise.view(mean.shape))
    reconstruction = cross_entropy(logits.flatten(0, 1), labels.flatten())
    per_dimension = 0.5 * (mean**2 + std**2 - 1) - log_std
    kl = per_dimension.clamp(min=0.01).sum(-1).flatten()[1:].mean()  # the first chunk is masked
    output = model.train()(ids, labels, latent_noise=noise)
    assert torch.allclose(output.loss, 4 * reconstruction + 0.3 * kl, rtol=1e-5)
    assert torch.allclose(output.reconstruction_loss, reconstruction, rtol=1e-5)
    assert torch.allclose(output.kl, kl, rtol=1e-5)
    share = (per_dimension.flatten(0, 1)[1:].mean(0) <= 0.01).float().mean()
    assert torch.allclose(output.collapsed, share)
    assert output.accuracy is None
    evaluated = model.eval()(ids, labels, latent_noise=noise)
    assert torch.allclose(evaluated.loss, reconstruction, rtol=1e-5)
    assert evaluated.accuracy.shape == (3,)


def test_token_dropout_hits_its_rate_and_only_in_training():
    model = tiny.autoencoder(ae_dropout=0.25)
    seen = []
    model.encoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    ids = tiny.tokens(batch=50, chunks=20)  # no token is 0
    model.train()(ids, ids, seed=0)
    model.eval()(ids, ids, seed=0)
    trained, evaluated = seen
    assert torch.equal(evaluated, ids)
    kept = trained != 0
    assert torch.equal(trained[kept], ids[kept])
    assert abs((~kept).float().mean().item() - 0.25) < 4 * (0.25 * 0.75 / ids.numel()) ** 0.5


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, (0.25, 0.25)),
        ({"token_dropout": 0.0}, (0.0, 0.25)),
        ({"latent_dropout": 0}, (0.25, 0.0)),
        ({"ae_dropout": 0.0, "latent_dropout": 0.25}, (0.0, 0.25)),
        ({"token_dropout": 0.5, "latent_dropout": 0.1}, (0.5, 0.1)),
    ],
    ids=str,
)
def test_each_dropout_can_be_set_alone(own, expected):
    model = tiny.autoencoder(**{"ae_dropout": 0.25, **own}).train()
    seen, latents = [], []
    model.encoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    model.decoder.latent_to_hidden.register_forward_pre_hook(
        lambda _, args: latents.append(args[0])
    )
    ids = tiny.tokens(batch=50, chunks=20)  # no token is 0
    model(ids, ids, seed=0)
    for values, chance in zip((seen[0], latents[0]), expected, strict=True):
        assert (values == 0).float().mean().item() == pytest.approx(chance, abs=0.03)


def test_a_copy_is_independent():
    """The decoder of a copied autoencoder uses the copy's embedding."""
    model = tiny.autoencoder()
    other = copy.deepcopy(model)
    other.encoder.embed_tokens.weight.data.zero_()
    latents = torch.randn(1, 2, tiny.LATENT)
    assert other.decoder(latent_states=latents).abs().max() == 0
    assert model.decoder(latent_states=latents).abs().max() > 0
