"""Votes that are counted: the same choices, and what the candidates were."""

import torch
from decoding_distributions import ToyDistribution, row_seeds

from calm.decoding.sampling.methods import Batch
from calm.decoding.sampling.tallied_vote import TalliedBatch

CHANCES = (0.4, 0.3, 0.2, 0.1)
FIELDS = {"temperature": 0.5, "num_samples": 16, "max_draws": 32}


def both(choose):
    """A chunk of `Batch` and of `TalliedBatch`, and the tallies."""
    received = []
    plain, same = (
        choose(method, ToyDistribution(CHANCES, 3), row_seeds(3))
        for method in (Batch(**FIELDS), TalliedBatch(**FIELDS, receive=received.append))
    )
    assert torch.equal(plain.packed, same.packed)
    (tallies,) = received
    return plain, tallies


def test_all_candidates_are_counted():
    chunk, tallies = both(lambda method, distribution, seed: method.choose(distribution, seed))
    draws = ToyDistribution(CHANCES, 3).latents(16, row_seeds(3)).long()[..., 0]  # [N, B]
    for row, tally in enumerate(tallies):
        counts = torch.bincount(draws[:, row], minlength=4).tolist()
        assert tally == {(i // 2, i % 2): n for i, n in enumerate(counts) if n}
        assert tally[tuple(chunk.tokens[row].tolist())] >= 2


def test_draws_that_do_not_begin_with_the_given_tokens_are_not_counted():
    given, length = torch.tensor([[1, 0], [1, 0], [0, 0]]), torch.tensor([1, 1, 0])
    chunk, tallies = both(
        lambda method, distribution, seed: method.complete(distribution, given, length, seed)
    )
    assert all(first == 1 for tally in tallies[:2] for first, _ in tally)
    assert [tally.total() < 16 for tally in tallies] == chunk.is_fallback.tolist()
    assert tallies[2].total() == 16 and tallies[0].total() > 2


def test_methods_that_tell_others_are_not_equal():
    """Equal predictors would share a batch, and one would be told the other's votes."""
    one, other = (TalliedBatch(receive=[].append) for _ in range(2))
    assert one != other and one == one and hash(one) != hash(other)
