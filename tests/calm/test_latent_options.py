"""Options of the autoencoder's latent: what each computes, when, and that files keep it."""

import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy
from training_cases import history, make_trainer, train

from calm import Autoencoder, AutoencoderConfig, EnergyTransformer
from calm.errors import UserError
from calm.models.latent_options import mean_on_sphere, noise_size, on_sphere

SPHERE, NOISE, MIXING = {"latent_sphere": True}, {"decoder_noise": 0.7}, {"num_mixing_layers": 2}
PLAIN = {"ae_dropout": 0.0, "initializer_range": 0.2}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latent_sphere": "yes"}, "'latent_sphere'.*'yes'"),
        ({"num_mixing_layers": -1}, "num_mixing_layers must be at least 0, got -1"),
        ({"alignment_weight": -1}, "alignment_weight must be at least 0, got -1"),
        ({"decoder_noise": -0.1}, "decoder_noise must be at least 0, got -0.1"),
        ({"decoder_noise": float("nan")}, "decoder_noise must be a finite number, got nan"),
        ({"decoder_noise_growth": 1.5}, r"decoder_noise_growth must lie in \[0, 1\], got 1.5"),
    ],
    ids=str,
)
def test_bad_fields(fields, message):
    with pytest.raises(UserError, match=f"(?s)AutoencoderConfig: .*{message}"):
        AutoencoderConfig(**fields)


@pytest.mark.parametrize("fields", [SPHERE, MIXING, NOISE], ids=str)
def test_an_option_is_saved_with_both_models(tmp_path, fields):
    ids = tiny.tokens()
    model = tiny.autoencoder(**PLAIN, **fields)
    model.save_pretrained(tmp_path / "ae")
    loaded = Autoencoder.from_pretrained(tmp_path / "ae")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for mode in (True, False):
        losses = [each.train(mode)(ids, ids, seed=3).loss for each in (model, loaded)]
        assert losses[0].equal(losses[1])
    name, value = next(iter(fields.items()))
    calm = EnergyTransformer.from_autoencoder(model, tiny.config(initializer_range=0.2))
    calm.save_pretrained(tmp_path / "calm")
    again = EnergyTransformer.from_pretrained(tmp_path / "calm")
    assert getattr(again.ae_model.config, name) == value
    assert again.ae_model.encoder(ids).equal(model.encoder(ids))
    assert again(ids, ids, seed=3).loss.equal(calm.eval()(ids, ids, seed=3).loss)


class TestSphere:
    def test_its_formula(self):
        latents = torch.randn(3, 2, 5, dtype=torch.float64)
        expected = 5**0.5 * latents / latents.square().sum(-1, keepdim=True).sqrt()
        assert torch.allclose(on_sphere(latents), expected)
        assert on_sphere(torch.tensor([3.0, 4.0])).tolist() == pytest.approx(
            [0.6 * 2**0.5, 0.8 * 2**0.5]
        )
        assert not on_sphere(torch.zeros(4)).any()
        assert on_sphere(torch.ones(4, dtype=torch.bfloat16)).dtype == torch.bfloat16

    def test_its_gradient(self):
        latents = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(mean_on_sphere, latents)
        on_sphere(latents).backward(torch.randn(2, 6))
        assert torch.allclose((latents.grad * latents).sum(-1), torch.zeros(2).double(), atol=1e-12)

    def test_the_mean_is_on_it_and_the_rest_as_it_was(self):
        """The same weights with and without: the decoder sees directions alone."""
        plain, sphere = tiny.autoencoder(**PLAIN), tiny.autoencoder(**PLAIN, **SPHERE)
        assert plain.state_dict().keys() == sphere.state_dict().keys()
        ids = tiny.tokens()
        states, others = sphere.encoder(ids), plain.encoder(ids)
        (mean, log_std), (plain_mean, plain_log_std) = states.chunk(2, -1), others.chunk(2, -1)
        assert torch.allclose(mean.square().sum(-1), torch.tensor(float(tiny.LATENT)))
        assert torch.allclose(mean / plain_mean, (mean / plain_mean)[..., :1], rtol=1e-4)
        assert log_std.equal(plain_log_std)
        decoder = sphere.decoder
        assert torch.allclose(decoder(2.5 * mean), decoder(mean), atol=1e-5)
        assert torch.allclose(decoder(mean), plain.decoder(mean), atol=1e-5)
        assert not torch.allclose(decoder(2.5 * mean), plain.decoder(2.5 * mean), atol=1e-3)

    def test_above_the_floor_the_kl_teaches_the_standard_deviation_alone(self):
        model = tiny.autoencoder(**PLAIN, **SPHERE, kl_clamp=0, kl_weight=1e6).train()
        ids = tiny.tokens()
        model(ids, ids, seed=1).loss.backward()
        of_mean, of_log_std = model.encoder.hidden_to_latent.weight.grad.chunk(2)
        assert of_log_std.abs().max() > 1e4 * of_mean.abs().max() > 0


def mixed(**fields):
    """An autoencoder whose mixing blocks are no longer the identity."""
    model = tiny.autoencoder(**PLAIN, **MIXING, **fields)
    for block in (*model.encoder.mixing_layers, *model.decoder.mixing_layers):
        torch.nn.init.normal_(block.down.weight, std=0.5)
    return model


class TestMixing:
    def test_its_formula(self):
        torch.manual_seed(0)
        block, hidden = mixed().encoder.mixing_layers[0], torch.randn(2, 4, 12)
        torch.nn.init.normal_(block.norm.weight)
        expected = hidden.clone()
        normed = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt() * block.norm.weight
        for row in range(2):
            for channel in range(12):
                slots = normed[row, :, channel]
                gate, up = block.gate.weight @ slots, block.up.weight @ slots
                gated = gate * gate.sigmoid() * up
                expected[row, :, channel] += block.down.weight @ gated
        assert torch.allclose(block(hidden), expected, atol=1e-5)

    @pytest.mark.parametrize("initializer", ["normal", "fan_in"])
    def test_it_starts_as_the_identity_and_learns(self, initializer):
        model, ids = tiny.autoencoder(**MIXING, initializer=initializer), tiny.tokens()
        hidden = torch.randn(2, 4, 12)
        for part in (model.encoder, model.decoder):
            assert all(block(hidden).equal(hidden) for block in part.mixing_layers)
        model.train()(ids, ids, seed=0).loss.backward()
        assert all(b.down.weight.grad.abs().max() > 0 for b in model.decoder.mixing_layers)
        assert model.encoder.mixing_layers[0].gate.weight.std().item() == pytest.approx(
            0.5, rel=0.4
        )

    def test_tokens_multiply(self):
        """What leaves the published encoder's slots is a sum over tokens; here it is not."""

        def interaction(model):
            states = []
            handle = model.encoder.squeeze_layer.register_forward_hook(
                lambda *given: states.append(given[2])
            )
            chunks = torch.tensor([[1, 2, 3, 4], [9, 2, 3, 4], [1, 8, 3, 4], [9, 8, 3, 4]])
            model.encoder(chunks)
            handle.remove()
            plain, first, second, both = states[0][:, 0]
            return (both - first - second + plain).norm() / (both - plain).norm()

        assert interaction(tiny.autoencoder(**PLAIN)) < 1e-5
        assert interaction(mixed()) > 1e-2

    def test_lazy_decoding_gives_the_same_tokens(self):
        model = tiny.model(ae_fields=MIXING).eval()
        model.ae_model = mixed()
        latents, target = torch.randn(6, 5, tiny.LATENT), tiny.tokens(batch=5, chunks=1)
        whole = model.decode_latents(latents)
        assert whole.equal(model.ae_model.decoder(latents).unflatten(1, (-1, 4)).argmax(-1))
        compared = model.decode_compared(latents, target)
        assert torch.where(compared >= 0, compared, whole).equal(whole)


class TestNoise:
    def test_its_size_grows_in_a_straight_line(self):
        config = tiny.autoencoder_config(decoder_noise=2, decoder_noise_growth=0.5)
        sizes = [noise_size(config, progress) for progress in (0.0, 0.125, 0.5, 0.9)]
        assert sizes == [0.0, 0.5, 2.0, 2.0]
        assert noise_size(tiny.autoencoder_config(decoder_noise=2, decoder_noise_growth=0), 0) == 2

    def test_it_is_added_to_what_the_decoder_reads_in_training(self):
        model, ids = tiny.autoencoder(**PLAIN, **NOISE), tiny.tokens()
        noise, added = torch.randn(15, tiny.LATENT), torch.randn(15, tiny.LATENT)
        given = {"latent_noise": noise, "decoder_noise": added, "progress": 0.25}
        mean, log_std = model.encoder(ids).flatten(0, 1).chunk(2, -1)
        clean = mean + log_std.exp() * noise
        for mode, latent in ((True, clean + 0.35 * added), (False, clean)):
            logits = model.decoder(latent.view(3, 5, -1)).flatten(0, 1)
            expected = cross_entropy(logits, ids.flatten())
            found = model.train(mode)(ids, ids, **given).reconstruction_loss
            assert torch.allclose(found, expected, rtol=1e-5)
        with pytest.raises(ValueError, match=r"decoder_noise must have shape \(15, 8\)"):
            model.train()(ids, ids, decoder_noise=added[:3])

    def test_it_changes_no_other_draw_and_any_split_draws_the_same(self):
        """At its beginning there is none, and the loss is that without the option."""
        noisy, plain = (tiny.autoencoder(initializer_range=0.2, **f).train() for f in (NOISE, {}))
        ids = tiny.tokens(batch=4)
        assert noisy(ids, ids, seed=3, progress=0.0).loss.equal(plain(ids, ids, seed=3).loss)
        whole = noisy(ids, ids, seed=3).loss
        assert not torch.allclose(whole, plain(ids, ids, seed=3).loss, rtol=1e-3)
        parts = [noisy(ids[i : i + 1], ids[i : i + 1], seed=3, first_row=i).loss for i in range(4)]
        assert torch.allclose(torch.stack(parts).mean(), whole, rtol=1e-5)

    def test_a_resumed_run_goes_on_with_its_size(self, tmp_path):
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "sequences": 16}
        fields = {**NOISE, "initializer_range": 0.2}
        whole = train(tiny.autoencoder(**fields), tmp_path, **settings)
        resumed = make_trainer(tiny.autoencoder(**fields), tmp_path / "other", **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert history(resumed, "loss") == history(whole, "loss")
        plain = train(tiny.autoencoder(initializer_range=0.2), tmp_path / "plain", **settings)
        pairs = list(zip(history(whole, "loss"), history(plain, "loss"), strict=True))
        assert pairs[0][0] == pairs[0][1] and pairs[1][0] != pairs[1][1]
