"""The generative heads: where their draws come from, how they start, what their parts compute."""

import itertools
import math

import pytest
import tiny
import torch
from torch.distributions import Normal, kl_divergence

from calm.errors import UserError
from calm.models import MODEL_CLASSES
from calm.models.heads import diffusion
from calm.models.heads.base import Posterior

HEADS = tuple(MODEL_CLASSES)
every_head = pytest.mark.parametrize("head", HEADS)


@every_head
def test_the_first_draws_do_not_depend_on_how_many_follow(head):
    model = tiny.model(head)
    hidden = torch.randn(2, 3, model.config.hidden_size)
    sample = model.generative_head.sample
    few, many = (sample(hidden, num_samples=n, seed=4, first_row=9) for n in (2, 5))
    assert few.shape == (2, 2, 3, tiny.LATENT)
    assert torch.allclose(few, many[:2], atol=1e-6)
    assert not torch.allclose(many[0], many[1], atol=1e-2)
    one = sample(hidden, seed=4, first_row=9)
    assert torch.allclose(one, many[0], atol=1e-6)


@every_head
def test_noise_scale_zero_is_deterministic(head):
    model = tiny.model(head)
    hidden = torch.randn(2, 3, model.config.hidden_size)
    sample = model.generative_head.sample
    first = sample(hidden, seed=1, noise_scale=0.0)
    assert torch.equal(first, sample(hidden, seed=2, noise_scale=0.0))
    assert not torch.allclose(first, sample(hidden, seed=2, noise_scale=0.5), atol=1e-4)
    with pytest.raises(ValueError, match="noise_scale"):
        sample(hidden, noise_scale=-1.0)


@every_head
def test_noise_spread_narrows_the_draws(head):
    model = tiny.model(head)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, model.config.hidden_size, generator=generator)
    if head == "energy":  # as after training: blocks normalise again, beside a bias of zero
        bias = model.generative_head.norm_noise.bias.data
        bias.copy_(torch.randn(bias.shape, generator=generator))

    def sample(noise_spread, seed=4, **options):
        return model.generative_head.sample(
            hidden, num_samples=16, seed=seed, noise_spread=noise_spread, **options
        )

    plain = model.generative_head.sample(hidden, num_samples=16, seed=4)
    assert torch.equal(sample(1.0), plain)
    widths = [sample(spread).std(0).mean().item() for spread in (1.0, 0.5, 0.2, 0.05, 0.0)]
    assert all(narrow < wide for wide, narrow in itertools.pairwise(widths))
    assert widths[-1] < 1e-6  # each row has one latent
    assert torch.equal(sample(0.0), sample(0.0, seed=5))
    with pytest.raises(ValueError, match=r"noise_spread must be finite and at least 0, got -1.0"):
        sample(-1.0)


@pytest.mark.parametrize("head", ["diffusion", "flow"])
def test_noise_spread_is_noise_scale_where_nothing_normalises_the_noise(head):
    model = tiny.model(head)
    hidden = torch.randn(2, model.config.hidden_size)
    sample = model.generative_head.sample
    both = sample(hidden, seed=1, noise_scale=0.6, noise_spread=0.5)
    torch.testing.assert_close(both, sample(hidden, seed=1, noise_scale=0.3))


@every_head
def test_one_seed_a_row_makes_rows_independent_of_their_batch(head):
    model = tiny.model(head)
    hidden = torch.randn(3, model.config.hidden_size)
    seeds = torch.tensor([11, 12, 13])
    sample = model.generative_head.sample
    together = sample(hidden, seed=seeds, first_row=6)
    alone = sample(hidden[1:2], seed=seeds[1:2], first_row=6)
    assert torch.allclose(together[1], alone[0], atol=1e-6)


# Initial weights


def test_the_energy_head_starts_at_zero_or_scaled():
    zero = tiny.model(head_init="zero").generative_head
    assert zero.output.weight.abs().max() == 0
    assert zero.output.bias.abs().max() == 0
    scaled = tiny.model(
        head_init="scaled", hidden_size=256, latent_size=64, ae_fields={"latent_size": 64}
    )
    weight = scaled.generative_head.output.weight
    assert abs(weight.std().item() * 256**0.5 - 1) < 0.05
    assert scaled.generative_head.output.bias.abs().max() == 0


@pytest.mark.parametrize("head", ["diffusion", "flow"])
def test_a_denoiser_starts_as_published(head):
    """Zero modulations and output, small time weights, Xavier elsewhere."""
    net = tiny.model(
        head, head_init="zero", hidden_size=64, num_attention_heads=2
    ).generative_head.net
    for name, parameter in net.named_parameters():
        if "adaLN" in name or name.startswith("final_layer.linear") or name.endswith("bias"):
            assert parameter.abs().max() == 0, name
        elif "time_embed" in name:
            assert abs(parameter.std().item() / 0.02 - 1) < 0.1, name
        elif "in_ln" not in name:
            bound = math.sqrt(6 / sum(parameter.shape))
            assert 0.9 * bound < parameter.abs().max() <= bound, name
    assert tiny.model(head).generative_head.net.final_layer.linear.weight.abs().max() > 0


def test_fan_in_weights_and_embedding():
    fields = {"initializer": "fan_in", "embedding_std": 0.5, "hidden_size": 64}
    model = tiny.model(ae_fields={**fields, "embedding_std": 0.1, "pad_token_id": None}, **fields)
    for linear in (
        model.embed_proj[0],
        model.transformer.layers[0].mlp.down_proj,
        model.generative_head.hidden_embd,
        model.ae_model.encoder.squeeze_layer,
    ):
        expected = 0.7 / linear.in_features**0.5
        assert abs(linear.weight.std().item() / expected - 1) < 0.1, linear
    assert abs(model.transformer.embed_tokens.weight[1:].std().item() / 0.5 - 1) < 0.1
    assert model.transformer.embed_tokens.weight[0].abs().max() == 0  # the padding token
    assert abs(model.ae_model.encoder.embed_tokens.weight.std().item() / 0.1 - 1) < 0.1


# Diffusion


def test_the_schedule_is_that_of_its_formulas():
    betas = diffusion.cosine_betas(1000)
    table = diffusion.schedule(betas)
    assert betas.dtype == torch.float64
    assert betas.max() == 0.999
    assert torch.allclose(table.signal**2 + table.noise**2, torch.ones(1000, dtype=torch.float64))
    # Bayes' rule for x_{t-1} given x_t and z, step by step
    t = 400
    before = table.signal[t - 1] ** 2
    prior_variance, step_variance = 1 - before, betas[t]
    gain = (
        prior_variance * (1 - betas[t]).sqrt() / ((1 - betas[t]) * prior_variance + step_variance)
    )
    assert torch.allclose(table.from_noisy[t], gain)
    assert torch.allclose(table.from_latent[t], before.sqrt() * (1 - gain * (1 - betas[t]).sqrt()))
    variance = prior_variance * (1 - gain * (1 - betas[t]).sqrt())
    assert torch.allclose(table.log_posterior[t], variance.log())
    assert table.log_posterior[0] == table.log_posterior[1]


def test_gaussian_kl_and_discretised_likelihood():
    mean, other, log_variance, other_log_variance = torch.randn(4, 50, dtype=torch.float64)
    first = Normal(mean, (0.5 * log_variance).exp())
    second = Normal(other, (0.5 * other_log_variance).exp())
    actual = diffusion.gaussian_kl(mean, log_variance, other, other_log_variance)
    assert torch.allclose(actual, kl_divergence(first, second))
    # The bins of width 2/255 around -1, ..., 1 share the whole mass.
    grid = torch.linspace(-1, 1, 256, dtype=torch.float64)
    log_mass = diffusion.discretised_log_likelihood(grid, torch.tensor(0.2), torch.tensor(-1.5))
    assert torch.allclose(log_mass.exp().sum(), torch.ones((), dtype=torch.float64), atol=1e-6)
    density = Normal(0.2, math.exp(-1.5)).log_prob(grid[1:-1]).exp()
    assert torch.allclose(log_mass[1:-1].exp(), density * 2 / 255, atol=2e-5)


def exact_noise(constant, tables):
    """The predictor of a head whose latents are all `constant`: ε = (x - signal c) / noise."""

    def predict(noisy, step, hidden):
        at = tables(step)
        epsilon = (noisy - at.signal * constant) / at.noise
        return epsilon, torch.full_like(epsilon, -1.0)  # the posterior's variance

    return predict


def test_diffusion_walks_to_the_latent_and_its_bound_vanishes(monkeypatch):
    """With the exact noise every sample is the constant latent, and q and p agree."""
    head = tiny.model("diffusion").generative_head
    constant = torch.linspace(-1, 1, tiny.LATENT)
    train = diffusion._train_schedule(torch.device("cpu"))
    monkeypatch.setattr(head, "_predict", exact_noise(constant, train.at))
    sample = head.sample(torch.zeros(5, 16), seed=0)
    assert torch.allclose(sample, constant.expand(5, -1), atol=1e-3)
    posterior = Posterior(
        constant.expand(2, 3, -1), torch.full((2, 3, tiny.LATENT), -40.0), torch.ones(2, 3)
    )
    times = torch.randint(1, 1000, (4 * 6,))
    loss = head.loss(torch.zeros(2, 3, 16), posterior, timesteps=times, seed=0).loss
    assert loss.shape == (2, 3) and loss.max() < 1e-4


def test_diffusion_times_cover_all_steps():
    head = tiny.model("diffusion").generative_head
    ends = head._times(torch.tensor([0.0, 0.5, 1 - 2**-24]))
    assert ends.tolist() == [0, 500, 999]


# Flow


def test_flow_walks_along_the_velocity(monkeypatch):
    """A velocity linear in the latent: ten midpoint steps multiply it by (1 + h + h²/2)^10."""
    head = tiny.model("flow").generative_head
    monkeypatch.setattr(head, "_velocity", lambda latent, time, hidden: -latent)
    start = torch.randn(5, tiny.LATENT)
    expected = start * (1 - 0.1 + 0.1**2 / 2) ** 10
    assert torch.allclose(head.sample(torch.zeros(5, 16), start), expected, atol=1e-6)


def test_flow_loss_of_the_exact_velocity_is_zero(monkeypatch):
    """All latents equal c: the velocity (c - x_t) / (1 - t) is exact."""
    head = tiny.model("flow").generative_head
    constant = torch.linspace(-1, 1, tiny.LATENT)
    monkeypatch.setattr(
        head, "_velocity", lambda latent, time, hidden: (constant - latent) / (1 - time[..., None])
    )
    posterior = Posterior(
        constant.expand(2, 3, -1), torch.full((2, 3, tiny.LATENT), -40.0), torch.ones(2, 3)
    )
    assert head.loss(torch.zeros(2, 3, 16), posterior, seed=0).loss.max() < 1e-6


@pytest.mark.parametrize(("head", "published", "a_step"), [("diffusion", 100, 1), ("flow", 10, 2)])
def test_sampling_steps(head, published, a_step):
    model = tiny.model(head)
    generative = model.generative_head
    hidden = torch.randn(2, model.config.hidden_size)
    before = generative.sample(hidden, seed=1)
    assert generative.num_evaluations == published * a_step
    calls = []
    generative.net.register_forward_hook(lambda *_: calls.append(1))
    model.config.sampling_steps = published
    assert torch.equal(generative.sample(hidden, seed=1), before)
    model.config.sampling_steps = 3
    assert not torch.allclose(generative.sample(hidden, seed=1), before)
    assert len(calls) == (published + 3) * a_step


def test_euler_is_a_midpoint_rule_without_the_middle():
    """One evaluation a step; both rules reach the end of a path of constant velocity."""
    model = tiny.model("flow")
    head = model.generative_head
    model.config.flow_sampler, model.config.sampling_steps = "euler", 4
    hidden, noise = torch.randn(2, model.config.hidden_size), torch.randn(2, tiny.LATENT)
    calls = []
    head.net.register_forward_hook(lambda *_: calls.append(1))
    drawn = head.sample(hidden, noise)
    assert len(calls) == head.num_evaluations == 4
    latent, condition = noise, head.net.cond_embed(hidden)
    for step in range(4):
        latent = latent + 0.25 * head._velocity(latent, torch.tensor(0.25 * step), condition)
    assert torch.equal(drawn, latent)


def test_given_noise_of_few_sampling_steps():
    """The start and a draw for each step; the last step adds none."""
    model = tiny.model("diffusion")
    model.config.sampling_steps = 3
    hidden = torch.randn(2, model.config.hidden_size)
    noise = torch.randn(1 + 3, 2, model.config.latent_size)
    sample = model.generative_head.sample
    expected = sample(hidden, noise)
    for step, is_used in enumerate((True, True, True, False)):
        other = noise.clone()
        other[step] += 1.0
        assert torch.equal(sample(hidden, other), expected) != is_used


@pytest.mark.parametrize(
    ("head", "steps", "message"),
    [("energy", 3, "None for the energy head"), ("diffusion", 1, "between 2 and 1000"),
     ("flow", 0, "between 1 and 1000")],
)  # fmt: skip
def test_sampling_steps_out_of_range(head, steps, message):
    config = tiny.model(head).config
    config.sampling_steps = steps
    with pytest.raises(UserError, match=message):
        config.validate_architecture()
