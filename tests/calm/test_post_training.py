"""Learning from rewards: optima and gradients by exact enumeration on small alphabets."""

import math
from itertools import product
from types import SimpleNamespace

import pytest
import tiny
import torch

from calm import CALMConfig, EnergyTransformer
from calm.data.tokenizer import byte_tokenizer
from calm.errors import UserError
from calm.models.heads.steered import SteeredHead
from calm.training.objectives import post_training
from calm.training.objectives.post_training import (
    PolicyObjective,
    PostTrainingArguments,
    energy_distance,
    target_weights,
)
from calm.training.objectives.rewards import BrierReward, FunctionReward
from calm.training.post_train import learn_from
from calm_kernels.energy_score import energy_score

ATOMS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [1.5, 1.5]], dtype=torch.float64)
SEED = torch.tensor([3, 0])
OLD = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
REWARDS = torch.tensor([0.0, 1.0, 0.5, 2.0], dtype=torch.float64)


def tuples(count):
    """Every tuple of atoms, ``[count, 4 ** count]``."""
    return torch.tensor(list(product(range(len(ATOMS)), repeat=count))).T


def expected_target(draws, **flags):
    """Mean weight of each atom over all groups of the old model's draws."""
    group = tuples(draws)
    weights = target_weights(REWARDS[group], PostTrainingArguments(**flags))
    assert weights.sum(0).allclose(torch.ones((), dtype=torch.float64))
    masses = torch.nn.functional.one_hot(group, len(ATOMS)) * weights[..., None]
    return (OLD[group].prod(0)[:, None] * masses.sum(0)).sum(0)


def expected_loss(new, target):
    """Mean over two draws of the new model of the loss against the mixture `target`."""
    pair = tuples(2)
    places = pair.shape[1]
    score = energy_score(
        ATOMS[pair], ATOMS[:, None].expand(-1, places, -1),
        target_weights=target[:, None].expand(-1, places),
    )  # fmt: skip
    return -(new[pair].prod(0) * score).sum()


TILTED = (OLD * (REWARDS / 0.7).exp()) / (OLD * (REWARDS / 0.7).exp()).sum()


class TestTilted:
    def test_the_loss_is_least_where_it_should_be(self):
        logits = TILTED.log().requires_grad_()
        least = expected_loss(logits.softmax(0), TILTED)
        (slope,) = torch.autograd.grad(least, logits)
        assert slope.abs().max() < 1e-12
        generator = torch.Generator().manual_seed(0)
        for other in (OLD, *torch.rand(20, 4, generator=generator, dtype=torch.float64)):
            other = other / other.sum()
            assert expected_loss(other, TILTED) > least + 1e-6

    def test_weights_of_many_draws_tend_to_the_tilted_distribution(self):
        """With an error of the order of 1/m: one draw is the old model."""
        tilted = OLD * (REWARDS / 2).exp() / (OLD * (REWARDS / 2).exp()).sum()
        errors = {
            draws: expected_target(draws, reward_temperature=2.0) - tilted for draws in (1, 3, 6)
        }
        torch.testing.assert_close(errors[1], OLD - tilted)
        far = {draws: 0.5 * error.abs().sum().item() for draws, error in errors.items()}
        assert 6 * far[6] == pytest.approx(3 * far[3], rel=0.03) and far[6] < far[1] / 5

    def test_signed_weights_are_the_direction_of_the_advantage(self):
        found = expected_target(3, weighting="signed", advantage_scale=0.8)
        mean = (OLD * REWARDS).sum()
        exact = OLD * (1 + 0.8 * (1 - 1 / 3) * (REWARDS - mean))
        torch.testing.assert_close(found, exact)

    def test_old_weight_adds_the_score_of_the_plain_draws(self):
        plain, tilted, both = (
            tilted_loss(reward_temperature=beta, old_weight=share)[0]
            for beta, share in ((1e9, 0.0), (0.1, 0.0), (0.1, 3.0))
        )
        torch.testing.assert_close(both, (tilted + 3 * plain) / 4)
        assert (tilted - plain).abs().max() > 1e-3


def test_energy_distance_is_unbiased():
    new = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    draws = tuples(5)  # two new ones and three old
    found = energy_distance(ATOMS[draws[:2]], ATOMS[draws[2:]], 1.5)
    chances = new[draws[:2]].prod(0) * OLD[draws[2:]].prod(0)
    lengths = torch.cdist(ATOMS, ATOMS).pow(1.5)
    exact = 2 * new @ lengths @ OLD - new @ lengths @ new - OLD @ lengths @ OLD
    torch.testing.assert_close((chances * found).sum(), exact)


def chunks_of(model, batch=2, first_row=0, weight=None):
    """What an objective reads of a text of four chunks, three of them predicted."""
    ids = tiny.tokens(batch=4, chunks=4)[first_row // 3 :][:batch]
    labels = ids[:, 4:].unflatten(1, (3, 4))
    weight = torch.ones(batch, 3) if weight is None else weight
    labels = labels.masked_fill(weight[..., None] == 0, -100)
    hidden = torch.randn(12, 16, generator=torch.Generator().manual_seed(4))
    hidden = hidden[first_row:][: 3 * batch].view(batch, 3, 16)
    return SimpleNamespace(model=model, input_ids=ids, labels=labels, hidden=hidden, weight=weight)


def tilted_loss(batch=2, first_row=0, weight=None, **flags):
    model = tiny.model().train()
    learn_from(
        model, PostTrainingArguments(**{"reward": "repetition:1", **flags}), byte_tokenizer()
    )
    chunks = chunks_of(model, batch, first_row, weight)
    found = model.objective.loss(chunks, seed=SEED, first_row=first_row)
    return found.loss, found.measured


@pytest.mark.parametrize("method", ["tilted", "policy"])
class TestObjective:
    def test_masked_positions_have_no_loss_and_are_not_asked_about(self, method):
        asked = []
        model = tiny.model().train()
        flags = PostTrainingArguments(method=method, num_draws=4, old_weight=0.5)
        objective = learn_from(model, flags, byte_tokenizer())
        reward = FunctionReward(
            lambda contexts, chunks: asked.extend(contexts) or [float(c[0]) for c in chunks], "mine"
        )
        objective = type(objective)(flags, reward, objective.old_head)
        chunks = chunks_of(model, weight=torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]))
        found = objective.loss(chunks, seed=SEED, first_row=0)
        for values in (found.loss, *found.measured.values()):
            assert ((values != 0) == chunks.weight.bool()).all()
        ids = chunks.input_ids
        first, last, other = (
            tuple(ids[row, :end].tolist()) for row, end in ((0, 4), (0, 12), (1, 12))
        )
        assert set(asked) == {first, last, other}
        found.loss.sum().backward()
        learning = {name for name, weight in model.named_parameters() if weight.grad is not None}
        expected = "mlp_generator." + ("noise_policy." if method == "policy" else "")
        assert learning and all(name.startswith(expected) for name in learning)

    def test_a_brier_reward_reads_neither_posteriors_nor_contexts(self, method, monkeypatch):
        model, ids = tiny.model().train(), tiny.tokens(batch=2, chunks=4)
        learn_from(model, PostTrainingArguments(method=method, num_draws=4), byte_tokenizer())
        monkeypatch.setattr(model, "encode", None)
        monkeypatch.setattr(post_training._Positions, "_contexts", None)
        assert model(ids, ids, seed=3).loss.isfinite()

    def test_parts_of_a_batch_draw_what_the_whole_draws(self, method):
        options = {"method": method, "num_draws": 4, "reward": "regex:[a-z]"}
        whole = tilted_loss(batch=4, **options)[0]
        parts = [tilted_loss(batch=2, first_row=first, **options)[0] for first in (0, 6)]
        torch.testing.assert_close(torch.cat(parts), whole)

    def test_the_old_and_the_new_draw_independently(self, method):
        """Shared noise would make the distance of equal heads negative at every position."""
        _, measured = tilted_loss(batch=4, method=method, num_draws=8)
        distance = measured["energy_distance"]
        assert distance.min() < 0 < distance.max()
        assert ("effective_draws" in measured) == (method == "tilted")


class PlainHead(SteeredHead):
    """Draws its noise itself: a chunk is whether ε > 0."""

    def forward(self, hidden, noise, **_):
        return noise


def toy_gradient(reward, mean=0.0, draws=3, rows=20_000):
    """Gradient of the objective by the policy's mean and log-deviation, from many positions."""
    config = tiny.config(noise_size=1, latent_size=1)
    head = PlainHead(config)
    head.start_from(SteeredHead(config))
    with torch.no_grad():
        head.noise_policy.bias[0] = mean
    flags = PostTrainingArguments(method="policy", num_draws=draws)
    old = SimpleNamespace(to=lambda _: SimpleNamespace(sample=lambda *_, **__: torch.randn(
        draws, rows, 1)))  # fmt: skip
    model = SimpleNamespace(
        config=config, generative_head=head, decode_latents=lambda latents: (latents > 0).long()
    )
    chunks = SimpleNamespace(
        model=model, hidden=torch.zeros(rows, 1, 16), weight=torch.ones(rows, 1),
        input_ids=torch.zeros(rows, 2, dtype=torch.long),
        labels=torch.ones(rows, 1, 1, dtype=torch.long),
    )  # fmt: skip
    loss = PolicyObjective(flags, reward, old).loss(chunks, seed=SEED, first_row=0).loss.mean()
    return loss.item(), torch.autograd.grad(loss, head.noise_policy.bias)[0].tolist()


def density(x):
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


class TestPolicy:
    """Of ε ~ N(μ, exp(2s)) the chunk is 1 with the chance P = Φ(μ / exp(s))."""

    def test_the_gradient_is_that_of_the_expected_reward(self):
        reward = FunctionReward(lambda _, chunks: [5.0 * one for (one,) in chunks], "mine")
        loss, (by_mean, by_log_std) = toy_gradient(reward, mean=0.7)
        assert loss == pytest.approx(-5 * 0.7580, abs=0.04)
        assert by_mean == pytest.approx(-5 * density(0.7), abs=0.06)
        assert by_log_std == pytest.approx(5 * 0.7 * density(0.7), abs=0.08)

    def test_the_gradient_is_that_of_the_expected_brier_score(self):
        """Unlike the one with the mean of the others as the baseline, 0.16 further away."""
        loss, (by_mean, _) = toy_gradient(BrierReward(), mean=0.7)
        chance = 0.7580
        score = 2 * chance - chance**2 - (1 - chance) ** 2
        assert loss == pytest.approx(-score, abs=0.02)
        assert by_mean == pytest.approx(-4 * (1 - chance) * density(0.7), abs=0.03)

    def test_density_and_draws_belong_together(self):
        head = SteeredHead(tiny.config(noise_size=3))
        torch.manual_seed(0)
        torch.nn.init.normal_(head.noise_policy.weight, std=0.2)
        torch.nn.init.normal_(head.noise_policy.bias, std=0.5)
        hidden = torch.randn(2, 16)
        mean, log_std = head.policy(hidden)
        drawn = head.draw(hidden, 4000, seed=1)
        exact = torch.distributions.Normal(mean, log_std.exp()).log_prob(drawn).sum(-1)
        torch.testing.assert_close(head.log_density(drawn, hidden), exact)
        torch.testing.assert_close(drawn.mean(0), mean, atol=0.1, rtol=0)
        torch.testing.assert_close(drawn.std(0).log(), log_std, atol=0.05, rtol=0)

    def test_it_starts_as_uniform_noise_and_a_checkpoint_keeps_what_it_learned(self, tmp_path):
        model = tiny.model().eval()
        hidden, ids = torch.randn(5, 16), tiny.tokens(batch=2, chunks=2)
        plain = model.generative_head.sample(hidden, num_samples=3, seed=4, first_row=2)
        head = model.add_noise_policy()
        assert model.add_noise_policy() is head
        found = head.sample(hidden, num_samples=3, seed=4, first_row=2)
        torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)
        options = {"max_new_tokens": 16, "seed": 1, "temperature": 1.0}
        before = model.generate(ids, **options)
        torch.nn.init.normal_(head.noise_policy.bias, std=3.0)
        model.save_pretrained(tmp_path)
        loaded = EnergyTransformer.from_pretrained(tmp_path).eval()
        assert loaded.config.noise_policy is True
        assert loaded.generate(ids, **options).equal(model.generate(ids, **options))
        assert not loaded.generate(ids, **options).equal(before)

    def test_a_factor_narrows_the_draws_towards_the_mean_that_was_learned(self):
        """ε = μ + f exp(s) g with f of both factors; given noise is the head's own matter."""
        torch.manual_seed(0)
        head = SteeredHead(tiny.config())
        head.start_from(SteeredHead(tiny.config()))
        torch.nn.init.normal_(head.output.weight, std=0.2)
        with torch.no_grad():
            head.noise_policy.bias[: head.noise_size] = 1.5
        hidden = torch.randn(5, 16)
        drawn = head.draw(hidden, 3, seed=4)
        narrow = head.as_noise(1.5 + 0.3 * (drawn - 1.5))
        found = head.sample(hidden, None, 3, 4, noise_scale=0.5, noise_spread=0.6)
        torch.testing.assert_close(found, head(hidden, narrow))
        mean = head(hidden, head.as_noise(torch.full_like(drawn[0], 1.5)))
        for factors in ({"noise_scale": 0.0}, {"noise_spread": 0.0}):
            torch.testing.assert_close(head.sample(hidden, **factors), mean)
            assert (head.sample(hidden, narrow[0], **factors) - mean).abs().max() > 1e-3
        with pytest.raises(ValueError, match="noise_spread must be finite"):
            head.sample(hidden, noise_spread=float("nan"))

    def test_who_can_have_one(self):
        with pytest.raises(UserError, match="noise_policy must be false for the flow head"):
            CALMConfig(noise_policy=True, head_type="flow")
