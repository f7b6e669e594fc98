"""A head that takes a temperature: what it draws, how it is saved, what it learns."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from decoding_distributions import ToyDistribution, check_frequencies, row_seeds, sharpened
from torch.nn.functional import one_hot

from calm import CALMConfig, EnergyTransformer
from calm.decoding.generation import make_predictor
from calm.decoding.sampling import voting
from calm.decoding.sampling.voting import vote, vote_distribution
from calm.errors import UserError
from calm.models.heads.tempered import TemperedHead
from calm.models.loading import load_checked
from calm.training.objectives.tempering import TemperatureObjective, TemperingArguments
from calm_kernels.noise import Stream, as_seed, uniform

BOUNDS = (0.3, 0.8)


class TestHead:
    def test_it_begins_as_the_head_that_it_copies(self):
        model = tiny.model().eval()
        keys = set(model.state_dict())
        head, hidden = model.add_tempered_head(BOUNDS), torch.randn(5, 16)
        assert {name for name in model.state_dict() if name not in keys} == {
            f"tempered_head.{name}" for name in head.state_dict()
        }
        expected = model.generative_head.sample(hidden, num_samples=3, seed=1)
        for temperature in (0.3, torch.tensor([0.3, 0.4, 0.5, 0.6, 0.8])):
            found = head.sample(head.condition(hidden, temperature), num_samples=3, seed=1)
            assert found.equal(expected)
        assert not head.training and head.noise_embd.weight is not model.mlp_generator.noise_embd

    def test_its_condition_as_written(self):
        head, hidden = tiny.tempered_model().tempered_head, torch.randn(4, 16)
        weight, log = head.temperature_embd.weight, torch.tensor(0.4).log()
        features = torch.tensor([torch.sin(-log * k / 2) for k in range(1, 9)])
        torch.testing.assert_close(head.condition(hidden, 0.4), hidden + weight @ features)
        each = torch.tensor([0.3, 0.4, 0.5, 1.0])
        rows = [head.condition(hidden[i], float(t)) for i, t in enumerate(each)]
        torch.testing.assert_close(head.condition(hidden, each), torch.stack(rows))
        assert rows[3].equal(hidden[3])

    def test_at_one_it_is_the_model_as_it_was(self):
        ids = tiny.tokens(batch=2)
        before = tiny.model().eval().generate(ids, max_new_tokens=12, temperature=1.0, seed=4)
        model = tiny.tempered_model()
        for method in ("direct", "amortized", "batch"):
            found = model.generate(ids, max_new_tokens=12, temperature=1.0, seed=4, method=method)
            assert found.equal(before), method

    @torch.no_grad()
    def test_a_chunk_takes_one_draw_at_its_temperature(self):
        model, ids = tiny.tempered_model(), tiny.tokens(batch=6)
        options = {"max_new_tokens": 4, "seed": 4, "method": "amortized", "return_details": True}
        found = model.generate(ids, temperature=0.5, **options)
        assert (found.draws == 1).all()
        other = model.generate(ids, temperature=0.3, **options)
        assert not found.sequences.equal(other.sequences)
        hidden = model(ids).last_hidden_state[:1, -1]
        head = model.tempered_head
        latent = head.sample(head.condition(hidden, 0.5), num_samples=1, seed=4)[0]
        assert found.sequences[0, -4:].equal(model.decode_latents(latent)[0])
        assert make_predictor(model, method="amortized", temperature=0.5).is_capturable

    def test_given_tokens_condition_a_chunk(self):
        model, ids = tiny.tempered_model(), tiny.tokens(batch=1)[:, :17]
        found = model.generate(ids, max_new_tokens=3, seed=1, method="amortized", temperature=0.5)
        assert found[:, :17].equal(ids) and found.shape == (1, 20)

    def test_saved_and_loaded(self, tmp_path):
        model = tiny.tempered_model()
        model.save_pretrained(tmp_path)
        loaded = load_checked(EnergyTransformer, str(tmp_path), "model").eval()
        assert loaded.config.tempered_range == [0.3, 0.8]
        for name, weight in model.state_dict().items():
            assert weight.equal(loaded.state_dict()[name]), name
        ids, options = tiny.tokens(), {"max_new_tokens": 8, "seed": 2, "method": "amortized"}
        assert loaded.generate(ids, **options).equal(model.generate(ids, **options))

    def test_a_head_that_is_there_goes_on(self):
        model = tiny.tempered_model()
        weight = model.tempered_head.temperature_embd.weight.clone()
        head = model.add_tempered_head((0.2, 0.9))
        assert head.temperature_embd.weight.equal(weight)
        assert model.config.tempered_range == [0.2, 0.9]


class TestMistakes:
    @pytest.mark.parametrize("temperature", [0.29, 0.81, 0.9999])
    def test_other_temperatures(self, temperature):
        match = r"must be 1 or lie in \[0.3, 0.8\], .* got " + str(temperature)
        with pytest.raises(UserError, match=match):
            make_predictor(tiny.tempered_model(), method="amortized", temperature=temperature)
        for end in (*BOUNDS, 0.3 * (1 - 1e-7)):
            make_predictor(tiny.tempered_model(), method="amortized", temperature=end)

    def test_models_without_such_a_head(self):
        with pytest.raises(UserError, match="run `calm distill-temperature`"):
            make_predictor(tiny.model(), method="amortized", temperature=0.5)
        with pytest.raises(UserError, match="a FlowTransformer cannot have"):
            make_predictor(tiny.model("flow"), method="amortized", temperature=0.5)

    def test_a_head_with_a_density_of_its_noise(self):
        model = tiny.model(noise_policy=True)
        with pytest.raises(UserError, match=r"noise_policy must be false .*policy`"):
            model.add_tempered_head(BOUNDS)
        assert model.tempered_head is None and model.config.tempered_range is None

    @pytest.mark.parametrize("bounds", [[0.5], [0.0, 0.5], [0.5, 0.4], [0.5, 1.0]])
    def test_ranges(self, bounds):
        with pytest.raises(UserError, match="tempered_range must be two temperatures"):
            tiny.config(tempered_range=bounds)
        with pytest.raises(UserError, match="tempered_range must be two temperatures"):
            tiny.model().add_tempered_head(tuple(bounds))
        with pytest.raises(UserError, match="None for the flow head"):
            CALMConfig(tempered_range=[0.3, 0.8], head_type="flow")


class TestVote:
    CHANCES = (0.4, 0.3, 0.2, 0.1)

    @pytest.mark.parametrize("power", [1.25, 2.0, 2.5, 3.0])
    def test_winners_have_this_distribution(self, power):
        """Given the draws, over the randomness of `vote`; here 12 draws of one sequence."""
        count = 4000
        latents = ToyDistribution(self.CHANCES, 1).latents(12, row_seeds(1)).expand(-1, count, -1)
        distribution = ToyDistribution(self.CHANCES, count)
        tokens, _ = vote(distribution, latents, 1 / power, seed=row_seeds(count))
        chances = vote_distribution(distribution.select(torch.tensor([0])), latents[:, :1], power)
        number = latents[:, 0, 0].long()
        expected = (one_hot(number, 4) * chances).sum(0)
        assert expected.sum().item() == pytest.approx(1.0)
        check_frequencies(distribution.numbers(tokens), expected)

    def test_decoding_in_full_gives_the_same(self, monkeypatch):
        distribution = ToyDistribution(self.CHANCES, 9)
        latents, power = distribution.latents(20, row_seeds(9)), torch.linspace(1.2, 4, 9)
        lazily = vote_distribution(distribution, latents, power)
        assert lazily.shape == (20, 9)
        monkeypatch.setattr(voting, "is_host_readable", lambda latents: False)
        torch.testing.assert_close(vote_distribution(distribution, latents, power), lazily)


class ToyHead:
    """Draws x = 0, 1, 2 with chances P(x), a latent of one number."""

    def __init__(self, chances):
        self.edges = torch.tensor(chances).cumsum(0)[:-1]

    def uniforms(self, hidden, num_samples, seed, first_row):
        return uniform(
            len(hidden), 1, stream=Stream.HEAD, seed=seed, num_draws=num_samples,
            first_row=first_row,
        )  # fmt: skip

    def sample(self, hidden, *, num_samples, seed, first_row):
        drawn = self.uniforms(hidden, num_samples, seed, first_row)
        return (drawn > self.edges).sum(-1, keepdim=True).float()


class FreeHead(ToyHead, torch.nn.Module):
    """Draws the same, for one T alone, with edges between its steps that it learns."""

    gradient_checkpointing = False

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.edges = torch.nn.Parameter(torch.tensor([1 / 3, 2 / 3]))

    def condition(self, hidden, temperature):
        return hidden

    def sample(self, hidden, noise, num_samples, seed, first_row, *, recompute):
        drawn = self.uniforms(hidden, num_samples, seed, first_row)
        return (100 * (drawn - self.edges)).sigmoid().sum(-1, keepdim=True)


class ToyDecoder:
    """The nearest whole number, as a chunk of one token."""

    patch_size = 1

    def expand(self, latents):
        return latents[..., None, :]

    def project(self, slots):
        return slots[..., 0].round().long()


def toy_model(tempered_head, chances=(0.4, 0.35, 0.25)):
    """What the objective needs of a model."""
    config, decoder = tiny.config(latent_size=1, num_samples=8), ToyDecoder()
    return SimpleNamespace(
        generative_head=ToyHead(chances), tempered_head=tempered_head, config=config,
        ae_model=SimpleNamespace(decoder=decoder),
    )  # fmt: skip


def chunks_of(model, weight):
    """What this objective reads of a text: which chunks count, and hidden states."""
    hidden = torch.zeros(*weight.shape, 16)
    return SimpleNamespace(model=model, hidden=hidden, weight=weight)


def objective(**fields):
    return TemperatureObjective(TemperingArguments(**{"min_draws": 40, "max_draws": 40, **fields}))


def loss_of(objective, model, rows, step=0, first_row=0):
    chunks = chunks_of(model, torch.ones(1, rows))
    return objective.loss(chunks, seed=torch.tensor([3, step]), first_row=first_row)


class TestObjective:
    def test_it_is_weighted_and_differentiable(self):
        model = toy_model(TemperedHead(tiny.config(latent_size=1)))
        weight = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
        chunks, seed = chunks_of(model, weight), torch.tensor([3, 0])
        found = objective().loss(chunks, seed=seed, first_row=0)
        assert ((found.loss != 0) == weight.bool()).all()
        found.loss.sum().backward()
        assert all(weight.grad is not None for weight in model.tempered_head.parameters())

    @torch.no_grad()
    def test_parts_of_a_batch_draw_what_the_whole_draws(self, monkeypatch):
        model = toy_model(TemperedHead(tiny.config(latent_size=1)))
        varying = objective(min_draws=10, max_draws=60)
        whole = loss_of(varying, model, 12).loss
        parts = [loss_of(varying, model, 6, first_row=first).loss for first in (0, 6)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole)
        monkeypatch.setattr("calm.training.objectives.tempering.DRAWS_AT_A_TIME", 100)
        torch.testing.assert_close(loss_of(varying, model, 12).loss, whole)
        assert not loss_of(varying, model, 12, step=1).loss.equal(whole)

    def test_temperatures_and_draws_fill_their_ranges(self):
        chosen = objective(min_draws=10, max_draws=160)
        powers = chosen._powers(4000, torch.tensor([3, 0]), 0)
        assert 1.25 <= powers.min() < 1.26 and 3.31 < powers.max() <= 1 / 0.3
        middle = (1.25 / 0.3) ** 0.5  # half of them lie below, on a logarithmic scale
        assert (powers < middle).double().mean().item() == pytest.approx(0.5, abs=0.03)
        counts = [chosen._num_draws(torch.tensor([3, step])) for step in range(200)]
        assert min(counts) < 12 and max(counts) > 130 and 10 <= min(counts) <= max(counts) <= 160
        assert sum(count < 40 for count in counts) / 200 == pytest.approx(0.5, abs=0.12)

    @torch.no_grad()
    def test_votes_and_head_draw_independently(self):
        """The same noise for both would reward a head that repeats its draws."""
        model = tiny.model().eval()
        head = model.add_tempered_head(BOUNDS)
        hidden, seed = torch.randn(5, 16), as_seed(3, "cpu")
        power = torch.full((5,), 2.0)
        targets, _ = objective()._targets(model, hidden, power, seed, 0)
        own = head.sample(hidden, num_samples=4, seed=seed)
        assert (own[:, None] - targets).abs().amax(-1).min() > 1e-3

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"min_temperature": 0.0}, "0 < min <= max < 1"),
            ({"max_temperature": 1.0}, "0 < min <= max < 1"),
            ({"min_temperature": 0.9}, "0 < min <= max < 1"),
            ({"min_draws": 3}, "min_draws must lie between 1/min_temperature, 3.333"),
            ({"max_draws": 39}, "and max_draws; got 40 and 39"),
        ],
    )
    def test_mistakes(self, fields, message):
        with pytest.raises(UserError, match=message):
            objective(**fields)

    @pytest.mark.parametrize("temperature", [0.5, 0.4, 1 / 3])
    def test_on_a_finite_alphabet_it_learns_the_tempered_distribution(self, temperature):
        """Total variation to P^(1/T) / Z: within the noise, and far from what the model draws."""
        head, chances = FreeHead(), (0.4, 0.35, 0.25)
        fields = {"min_temperature": temperature, "max_temperature": temperature}
        fields |= {"min_draws": 100, "max_draws": 100}
        model, chosen = toy_model(head, chances), objective(**fields)
        optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 60)
        for step in range(60):
            optimizer.zero_grad()
            loss_of(chosen, model, 64, step).loss.mean().backward()
            optimizer.step()
            schedule.step()
        edges = head.edges.detach()
        learned = torch.cat([edges, torch.ones(1)]).diff(prepend=torch.zeros(1))
        wanted = sharpened(chances, 1 / temperature)
        assert (learned - wanted).abs().sum().item() / 2 < 0.04
        assert (learned - torch.tensor(chances)).abs().sum().item() / 2 > 0.05
