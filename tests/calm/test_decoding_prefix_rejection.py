"""Draws that begin with given tokens: which are kept, in what order, and what a cap does."""

import pytest
import torch
from decoding_distributions import ToyDistribution, row_seeds

from calm.decoding.sampling.chunk_distribution import decode
from calm.decoding.sampling.methods import METHODS, build_method
from calm.decoding.sampling.prefix_rejection import Prefix, collect_accepted, draw_accepted, waves
from calm.decoding.sampling.seeds import OFFSET_STRIDE, advance

CHANCES = (0.4, 0.3, 0.2, 0.1)


def build(name, **options):
    return build_method(name, temperature=1.0 if name == "direct" else 0.4, **options)


def test_waves_grow_to_their_size_and_stop_at_the_cap():
    seed = torch.tensor([[3, 5]])
    plan = list(waves(seed, 50, 130, first=16))
    assert [(before, size) for _, before, size in plan] == [(0, 16), (16, 32), (48, 50), (98, 32)]
    assert [wave_seed.tolist() for wave_seed, *_ in plan] == [
        [[3, 5 + wave * OFFSET_STRIDE]] for wave in range(4)
    ]
    assert sum(1 for _ in waves(seed, 1, 300_000, first=16)) == 300_000  # sizes stay small numbers


def test_accepted_draws_come_first_in_the_order_drawn():
    rows, size = 40, 30
    distribution, seed = ToyDistribution(CHANCES, rows), row_seeds(rows)
    prefix = Prefix(torch.ones(rows, 2, dtype=torch.int64), torch.arange(rows) % 3)
    accepted = draw_accepted(distribution, prefix, size, seed, 1.0)
    chunks = decode(distribution, distribution.latents(size, seed))  # [N, B, K]
    for row in range(rows):
        fits = [
            place for place in range(size) if (chunks[place, row, : prefix.length[row]] == 1).all()
        ]
        count = int(accepted.counts[row])
        assert accepted.place[row, :count].tolist() == fits
        assert torch.equal(decode(distribution, accepted.latents[:count, row]), chunks[fits, row])


def test_collected_draws_are_the_first_accepted_of_all_waves():
    rows, needed = 30, 14
    distribution, seed = ToyDistribution(CHANCES, rows), row_seeds(rows)
    prefix = Prefix(torch.ones(rows, 2, dtype=torch.int64), torch.arange(rows) % 3)
    found = collect_accepted(
        distribution, prefix, needed=needed, wave_size=25, max_draws=60, seed=seed, noise_scale=1.0
    )
    everything = torch.cat(
        [
            decode(distribution, distribution.latents(size, advance(seed, wave * OFFSET_STRIDE)))
            for wave, size in enumerate((25, 25, 10))
        ]
    )
    for row in range(rows):
        fits = (everything[:, row, : prefix.length[row]] == 1).all(-1).nonzero()[:, 0]
        count = min(needed, len(fits))
        assert found.counts[row] == count
        assert found.draws[row] == (fits[needed - 1] + 1 if count == needed else 60)
        assert torch.equal(
            decode(distribution, found.latents[:count, row]), everything[fits[:count], row]
        )
    assert (found.counts < needed).any() and (found.counts == needed).any()


@pytest.mark.parametrize("name", METHODS)
def test_completing_without_given_tokens_equals_choosing(name):
    rows = 50
    distribution, seed = ToyDistribution(CHANCES, rows), row_seeds(rows)
    method = build(name, num_samples=12)
    given_length = torch.arange(rows) % 2  # others of the batch are given a token
    chosen = method.choose(distribution, seed)
    completed = method.complete(distribution, torch.zeros(rows, 2).long(), given_length, seed)
    free = given_length == 0
    for field in ("tokens", "num_agreeing", "draws", "is_fallback"):
        assert torch.equal(getattr(chosen, field)[free], getattr(completed, field)[free]), field


@pytest.mark.parametrize("name", METHODS)
def test_the_given_row_is_returned_where_no_draw_is_accepted(name):
    """Token 7 is never drawn; the rest of the chunk is what the caller put there."""
    rows = 6
    distribution, seed = ToyDistribution(CHANCES, rows), row_seeds(rows)
    given = torch.tensor([[7, 9], [1, 9]]).repeat(3, 1)
    length = torch.ones(rows, dtype=torch.int64)
    chunk = build(name, num_samples=10, max_draws=400).complete(distribution, given, length, seed)
    never = given[:, 0] == 7
    if name != "noise_scale":  # here it draws only chunks that begin with 0
        assert (chunk.tokens[~never, 1] != 9).all()
        assert not chunk.is_fallback[~never].any() and (chunk.num_agreeing[~never] >= 1).all()
    assert torch.equal(chunk.tokens[never], given[never])
    assert chunk.is_fallback[never].all() and (chunk.draws[never] == 400).all()
    assert (chunk.num_agreeing[never] == 0).all()


@pytest.mark.parametrize("name", ["batch", "medoid"])
def test_a_choice_among_fewer_draws_than_needed_is_flagged(name):
    rows = 40
    distribution, seed = ToyDistribution((0.6, 0.3, 0.06, 0.04), rows), row_seeds(rows)
    given, length = torch.ones(rows, 2).long(), torch.ones(rows).long()
    chunk = build(name, num_samples=20, max_draws=40).complete(distribution, given, length, seed)
    has_any = chunk.num_agreeing > 0
    assert chunk.is_fallback.all() and has_any.any()
    assert (chunk.tokens[:, 0] == 1).all() and (chunk.tokens[has_any] <= 1).all()
