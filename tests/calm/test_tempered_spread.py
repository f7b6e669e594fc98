"""How far the noise of a tempered head is spread: interpolation, sampling, calibration."""

import math
from types import SimpleNamespace

import pytest
import tiny
import torch

from calm import EnergyTransformer
from calm.decoding.generation import make_predictor
from calm.errors import UserError
from calm.labels import IGNORE_INDEX
from calm.models.agreement import prefix_collisions
from calm.models.heads.tempered import spread_at
from calm.training.objectives import tempered_spread
from calm.training.objectives.tempered_spread import LEAST_SPREAD, matched_spread, vote_collisions
from calm_kernels.noise import Stream, uniform

BOUNDS = (0.3, 0.8)
KNOTS = [[0.3, 0.2], [0.6, 0.8]]
CELLS = 100


@pytest.fixture
def model():
    return tiny.tempered_model()


class TestInterpolation:
    def test_at_the_knots_between_them_and_outside(self):
        assert [spread_at(t, KNOTS) for t in (0.1, 0.3, 0.6, 0.8)] == pytest.approx(
            [0.2, 0.2, 0.8, 0.8]
        )
        assert spread_at(math.sqrt(0.3 * 0.6), KNOTS) == pytest.approx(math.sqrt(0.2 * 0.8))

    def test_one_knot_holds_everywhere_and_none_is_one(self):
        assert [spread_at(t, [[0.5, 0.4]]) for t in (0.3, 0.5, 0.7)] == pytest.approx([0.4] * 3)
        assert spread_at(0.5, None) == 1.0

    @pytest.mark.parametrize(
        "knots", [[], [[0.5]], [[0.5, 0.0]], [[0.6, 0.5], [0.3, 0.5]], [[0.5, 0.5], [0.5, 0.6]]]
    )
    def test_what_is_no_increasing_list_of_pairs_is_refused(self, knots):
        with pytest.raises(UserError, match="tempered_spread must be pairs"):
            tiny.config(tempered_range=list(BOUNDS), tempered_spread=knots)

    def test_without_a_tempered_head_it_is_refused(self):
        with pytest.raises(UserError, match="tempered_spread needs a tempered_range"):
            tiny.config(tempered_spread=KNOTS)


class TestSampling:
    def test_draws_are_those_of_the_head_with_this_spread(self, model):
        model.config.tempered_spread = KNOTS
        hidden = torch.randn(6, model.config.hidden_size)
        seed = torch.stack([torch.arange(6), torch.zeros(6, dtype=torch.int64)], 1)
        distribution = model.distribution(hidden, 0.3)
        head = model.tempered_head
        condition = head.condition(hidden, 0.3)
        expected = head.sample(condition, num_samples=3, seed=seed, noise_spread=0.2)
        assert distribution.latents(3, seed).equal(expected)
        some = distribution.select(torch.arange(2)).latents(3, seed[:2])
        torch.testing.assert_close(some, expected[:, :2])
        half = head.sample(condition, num_samples=3, seed=seed, noise_spread=0.1)
        torch.testing.assert_close(distribution.latents(3, seed, noise_spread=0.5), half)

    def test_the_head_of_the_model_keeps_its_own(self, model):
        ids = tiny.tokens(batch=2)
        before = model.generate(ids, max_new_tokens=8, temperature=0.5, num_samples=8, seed=4)
        model.config.tempered_spread = KNOTS
        again = model.generate(ids, max_new_tokens=8, temperature=0.5, num_samples=8, seed=4)
        assert again.equal(before)

    def test_it_is_saved_and_forgotten_where_the_head_learns_again(self, model, tmp_path):
        model.config.tempered_spread = KNOTS
        model.save_pretrained(tmp_path)
        loaded = EnergyTransformer.from_pretrained(tmp_path)
        assert loaded.config.tempered_spread == KNOTS
        loaded.add_tempered_head(BOUNDS)
        assert loaded.config.tempered_spread is None


class UniformModel:
    """Draws one of `CELLS` * spread tokens, all alike, at every T."""

    patch_size = 1

    def __init__(self):
        self.ae_model = SimpleNamespace(decoder=self)

    def head_at(self, temperature):
        return self

    def condition(self, hidden, temperature):
        return hidden

    def sample(self, hidden, *, num_samples, seed, noise_scale, noise_spread):
        drawn = uniform(len(hidden), 1, stream=Stream.HEAD, seed=seed, num_draws=num_samples)
        return noise_spread * drawn

    def expand(self, latents):
        return latents[..., None, :]

    def project(self, slots):
        return (CELLS * slots[..., 0]).floor().long()


class TestCalibration:
    @torch.no_grad()
    @pytest.mark.parametrize("temperature", [0.5, 0.4])
    def test_collisions_of_votes_are_those_of_votes_that_were_held(self, model, temperature):
        num_candidates, repeats = 40, 150
        hidden = torch.randn(40, model.config.hidden_size)
        each = torch.stack(
            [
                vote_collisions(model, hidden, [temperature, 1.0], num_candidates, seed)
                for seed in range(16)
            ]
        )
        predictor = make_predictor(
            model, method="batch", temperature=temperature, num_samples=num_candidates
        )
        rows = torch.arange(repeats * len(hidden))
        seeds = torch.stack([rows, torch.zeros_like(rows)], dim=1)
        held = predictor.choose(hidden.repeat(repeats, 1), seeds).tokens
        expected = prefix_collisions(held.unflatten(0, (repeats, -1))).mean(0)
        error = each.std(0) / len(each) ** 0.5
        assert ((each.mean(0)[0] - expected).abs() < 4 * error[0]).all()
        assert (each.mean(0)[1] < expected / 2).all()  # at T = 1 plain draws

    def test_states_are_those_before_whole_chunks(self, model):
        ids = tiny.tokens(batch=2, chunks=4)
        labels = ids.clone()
        labels[0, 9] = labels[1, 4:8] = IGNORE_INDEX  # in chunk 2 of one text, chunk 1 of the other
        trainer = SimpleNamespace(
            get_train_dataloader=lambda: [{"input_ids": ids, "labels": labels}],
            accelerator=SimpleNamespace(gather=lambda found: found),
        )
        states = model(ids).last_hidden_state
        expected = torch.stack([states[0, 0], states[0, 2], states[1, 1], states[1, 2]])
        assert tempered_spread._hidden_states(trainer, model).equal(expected)
        labels[:] = IGNORE_INDEX
        with pytest.raises(UserError, match="no whole chunk to measure on"):
            tempered_spread._hidden_states(trainer, model)

    @pytest.mark.parametrize("spread", [0.8, 0.3, 0.1])
    def test_draws_at_the_spread_that_is_found_agree_as_often(self, spread):
        agreement = -math.log(CELLS * spread)  # of a uniform distribution over this many tokens
        found = matched_spread(UniformModel(), torch.zeros(2000, 1), 0.5, agreement, seed=1)
        assert found == pytest.approx(spread, rel=0.05)

    def test_it_is_one_where_draws_agree_already_and_the_least_where_none_lets_them(self):
        model, hidden = UniformModel(), torch.zeros(200, 1)
        assert matched_spread(model, hidden, 0.5, -math.log(2 * CELLS), seed=1) == 1.0
        least = matched_spread(model, hidden, 0.5, 1.0, seed=1)
        assert least == pytest.approx(LEAST_SPREAD, rel=0.01)
