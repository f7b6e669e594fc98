"""Another basis of a trained latent: what it measures, what it keeps, and jobs that end with it."""

import pytest
import tiny
import torch
from safetensors.torch import load_file
from training_cases import MAIN, flags

from calm import Autoencoder, AutoencoderConfig
from calm.errors import UserError
from calm.models.whitening import LatentMoments, whiten

KINDS = ("diagonal", "full")


def trained():
    """An autoencoder whose dimensions differ in size, are correlated, and vary in noise."""
    model = tiny.autoencoder(initializer_range=0.4).double().eval()
    torch.manual_seed(4)
    with torch.no_grad():
        for linear in (model.encoder.hidden_to_latent, model.decoder.latent_to_hidden):
            linear.bias.normal_()
            linear.weight.mul_(torch.rand(len(linear.weight), 1) + 0.5)
        model.encoder.hidden_to_latent.bias[tiny.LATENT :] -= 2
    return model


def moments_of(model, ids, is_counted=None):
    states = model.encoder(ids)
    counted = torch.ones(states.shape[:2], dtype=torch.bool) if is_counted is None else is_counted
    return LatentMoments.of(states, counted)


@torch.no_grad()
def changed(kind):
    """A model, the same in the other basis, and the text whose moments those are."""
    model, other, ids = trained(), trained(), tiny.tokens(batch=40, chunks=10)
    whiten(other, moments_of(model, ids), kind)
    return model, other, ids


def test_bad_fields():
    with pytest.raises(UserError, match="'whitening' expected one of"):
        AutoencoderConfig(whitening="zca")
    with pytest.raises(UserError, match=r"whitening must be none with latent_sphere.*'full'"):
        AutoencoderConfig(whitening="full", latent_sphere=True)
    with pytest.raises(ValueError, match="moments must be of at least 2 chunks, got 1"):
        whiten(trained(), moments_of(trained(), tiny.tokens(1, 1)), "full")


@torch.no_grad()
def test_moments_of_batches_add_up_and_skip_what_does_not_count():
    model, ids = trained(), tiny.tokens(batch=4)
    parts = [moments_of(model, rows) for rows in (ids[:1], ids[1:])]
    for whole, summed in zip(moments_of(model, ids), parts[0].plus(parts[1]), strict=True):
        assert torch.allclose(whole, summed)
    is_counted = torch.ones(4, 5, dtype=torch.bool)
    is_counted[1:] = False
    for some, few in zip(moments_of(model, ids, is_counted), parts[0], strict=True):
        assert torch.allclose(some, few)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_latents_of_the_text_are_standard(kind):
    """Covariance of means, and the mean variance of the posterior on its diagonal."""
    model, other, ids = changed(kind)
    for each, is_standard in ((model, False), (other, True)):
        mean, log_std = (part.flatten(0, 1) for part in each.encoder(ids).chunk(2, -1))
        total = torch.cov(mean.T, correction=0) + torch.diag((2 * log_std).exp().mean(0))
        expected = torch.eye(tiny.LATENT, dtype=torch.float64)
        if kind == "diagonal":
            total = torch.diag(total.diagonal())
        assert torch.allclose(total, expected, atol=1e-9) == is_standard
        assert torch.allclose(mean.mean(0), torch.zeros(()).double(), atol=1e-9) == is_standard


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_decoder_reads_the_same_points(kind):
    model, other, ids = changed(kind)
    means = [each.encoder(ids).chunk(2, -1)[0] for each in (model, other)]
    assert not torch.allclose(*means, rtol=0.1)
    assert torch.allclose(model.decoder(means[0]), other.decoder(means[1]))


@torch.no_grad()
def test_a_diagonal_basis_is_the_same_model_in_other_units():
    model, other, ids = changed("diagonal")
    noise = torch.randn(400, tiny.LATENT, dtype=torch.float64)
    logits = [each(ids, latent_noise=noise).logits for each in (model, other)]
    assert torch.allclose(*logits)


@torch.no_grad()
def test_a_full_basis_has_the_noise_of_the_average_chunk():
    """Seen from the old basis: its covariance is the mean of those that the chunks had."""
    model, other, ids = changed("full")
    variance = (2 * model.encoder(ids).chunk(2, -1)[1]).exp().flatten(0, 1).mean(0)
    log_std = other.encoder(ids).chunk(2, -1)[1].flatten(0, 1)
    assert torch.allclose(log_std, log_std[:1]) and log_std.max() < 0
    both = (model.decoder.latent_to_hidden.weight, other.decoder.latent_to_hidden.weight)
    inverse = torch.linalg.lstsq(*both).solution
    seen = inverse @ torch.diag((2 * log_std[0]).exp()) @ inverse.T
    assert torch.allclose(seen, torch.diag(variance), atol=1e-9)


def test_a_job_ends_with_it_and_checkpoints_do_not(tmp_path, monkeypatch):
    """Only the basis differs; a finished run that is started again gives the same model."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    sizes = "hidden_size=16,intermediate_size=24,latent_size=8,whitening="
    words = flags(tmp_path, "autoencoder", f"--config_overrides={sizes}full")
    assert MAIN["autoencoder"](words) == 0
    folder = tmp_path / "autoencoder"
    first, last = load_file(folder / "model.safetensors"), folder / "checkpoint-4"
    plain = load_file(last / "model.safetensors")
    moved = {name for name in first if not first[name].equal(plain[name])}
    layers = ("encoder.hidden_to_latent", "decoder.latent_to_hidden")
    assert moved == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    assert not first["encoder.hidden_to_latent.weight"][8:].any()
    assert Autoencoder.from_pretrained(folder).config.whitening == "full"
    assert MAIN["autoencoder"](words) == 0
    again = load_file(folder / "model.safetensors")
    assert all(again[name].equal(weight) for name, weight in first.items())
