"""Brier-n from draws: the estimator itself, on known distributions."""

from itertools import combinations

import pytest
import torch

from calm.decoding.sampling.lazy_decode import decode_compared
from calm.models.agreement import (
    brier_terms,
    prefix_collisions,
    prefix_matches,
)

DISTRIBUTION = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)


def draw_chunks(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()
    return torch.multinomial(DISTRIBUTION, count, True, generator=generator).view(shape)


def test_a_case_by_hand():
    draws = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 9], [1, 7, 3, 4]])
    target = torch.tensor([1, 2, 3, 4])
    # c_y = 3, 2, 2, 1 of 3 draws; of the 3 pairs 3, 1, 1, 0 agree.
    expected = torch.tensor([2 - 1, 4 / 3 - 1 / 3, 4 / 3 - 1 / 3, 2 / 3 - 0])
    torch.testing.assert_close(brier_terms(draws, target), expected)


def test_it_is_the_two_draw_estimator_averaged_over_all_pairs():
    draws, target = draw_chunks((6, 50, 4)), draw_chunks((50, 4), seed=1)
    pairs = [brier_terms(draws[list(pair)], target) for pair in combinations(range(6), 2)]
    torch.testing.assert_close(brier_terms(draws, target), torch.stack(pairs).mean(0))


def test_two_draws_give_the_published_estimator():
    first, second, target = (
        draw_chunks((300, 4)),
        draw_chunks((300, 4), 1),
        draw_chunks((300, 4), 2),
    )
    for order in range(1, 5):
        hits = sum((x[:, :order] == target[:, :order]).all(-1).int() for x in (first, second))
        collision = (first[:, :order] == second[:, :order]).all(-1).int()
        result = brier_terms(torch.stack([first, second]), target)[:, order - 1]
        assert torch.equal(result, (hits - collision).float())


@pytest.mark.parametrize("count", [2, 4, 8])
def test_mean_and_variance_are_those_of_the_formula(count):
    repeats, outcome = 200_000, 0
    draws = draw_chunks((count, repeats, 1)).expand(-1, -1, 4)  # Brier-1 is all that varies
    result = brier_terms(draws, torch.full((repeats, 4), outcome))[:, 0].double()
    p, square = DISTRIBUTION[outcome], DISTRIBUTION.square().sum()
    z1, z2 = DISTRIBUTION.pow(3).sum() - square**2, square * (1 - square)
    variance = (
        4 * p * (1 - p) / count
        + (4 * (count - 2) * z1 + 2 * z2) / (count * (count - 1))
        - 8 * p * (p - square) / count
    )
    assert (result.mean() - (2 * p - square)).abs() < 4 * (variance / repeats).sqrt()
    assert result.var().item() == pytest.approx(variance.item(), rel=0.02)


def test_a_uniform_distribution_scores_its_own_collision_rate():
    repeats = 50_000
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(4, (8, repeats, 4), generator=generator)
    terms = brier_terms(draws, torch.zeros(repeats, 4, dtype=torch.int64))
    expected = torch.tensor([4.0**-order for order in range(1, 5)])
    errors = terms.std(0) / repeats**0.5
    assert ((terms.mean(0) - expected).abs() < 4 * errors).all()


@pytest.mark.parametrize(
    ("says", "score"), [([3, 1, 4, 1], 1.0), ([9, 1, 4, 1], -1.0)], ids=["right", "wrong"]
)
def test_a_deterministic_model_scores_one_or_minus_one(says, score):
    draws = torch.tensor(says).expand(5, 7, 4)
    terms = brier_terms(draws, torch.tensor([3, 1, 4, 1]).expand(7, 4))
    assert torch.equal(terms, torch.full((7, 4), score))


def test_longer_chunks_are_scored_on_their_first_four_tokens():
    draws, target = draw_chunks((4, 30, 8)), draw_chunks((30, 8), 1)
    assert torch.equal(brier_terms(draws, target), brier_terms(draws[..., :4], target[..., :4]))


def test_short_chunks_have_matches_and_collisions_but_no_brier():
    draws, target = draw_chunks((4, 30, 2)), draw_chunks((30, 2), 1)
    assert prefix_matches(draws, target).shape == (4, 30, 2)
    assert prefix_collisions(draws).shape == (30, 2)
    with pytest.raises(ValueError, match="draws must be chunks of at least 4 tokens, got 2"):
        brier_terms(draws, target)


def test_one_draw_is_not_enough():
    with pytest.raises(ValueError, match="draws must hold at least 2 draws to compare, got 1"):
        brier_terms(draw_chunks((1, 3, 4)), draw_chunks((3, 4)))


def test_ignored_labels_match_nothing():
    assert prefix_matches(torch.zeros(2, 4, dtype=torch.int64), torch.full((4,), -100)).sum() == 0


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("length", [4, 6])
def test_decoding_what_is_compared_gives_the_same_scores(count, length):
    draws, target = draw_chunks((count, 40, 5, length)), draw_chunks((40, 5, length), seed=1)
    target[0] = -100  # chunks that do not count
    rows = []

    def project(states):
        rows.append(len(states))
        return states.argmax(-1)

    slots = torch.nn.functional.one_hot(draws, 4).float()
    tokens = decode_compared(slots[..., :4, :], project, target[..., :4])
    expected = draws[..., :4]
    assert torch.equal(brier_terms(tokens, target), brier_terms(expected, target))
    assert torch.equal(prefix_matches(tokens, target), prefix_matches(expected, target))
    read = tokens >= 0
    assert torch.equal(tokens[read], expected[read]) and sum(rows) == int(read.sum())
    assert rows[0] == count * 200 and rows == sorted(rows, reverse=True)
    assert count > 2 or rows[-1] < rows[0] / 2


def test_nothing_more_is_decoded_where_nothing_agrees():
    draws, target = torch.tensor([[[0, 1, 2, 3]], [[1, 1, 2, 3]]]), torch.tensor([[2, 1, 2, 3]])
    slots = torch.nn.functional.one_hot(draws, 4).float()
    tokens = decode_compared(slots, lambda states: states.argmax(-1), target)
    assert tokens.tolist() == [[[0, -1, -1, -1]], [[1, -1, -1, -1]]]
