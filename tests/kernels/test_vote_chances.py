"""The distribution of the vote given its candidates, without the draw of a vote."""

from collections import Counter

import pytest
import torch

from calm_kernels.agreeing_patch import agreeing_patch, vote_chances
from calm_kernels.agreeing_patch.reference import _cascade

ROWS = 8_000
# Upper 1e-4 quantile of chi-square by degrees of freedom: seeded, so a failure is an error.
CHI_SQUARE = {1: 15.14, 2: 18.42, 3: 21.11}


def candidates_of(text, batch=1):
    """``[batch, len(text), 2]``: each letter is a chunk of two tokens."""
    row = torch.tensor([[ord(letter), ord(letter) + 1000] for letter in text])
    return row.expand(batch, *row.shape)


@pytest.mark.parametrize("form", ["factory", "gamma"])
@pytest.mark.parametrize("power", [1, 1.25, 2, 2.5, 3, 7.5])
@pytest.mark.parametrize("text", ["ABACABBACA", "AABBC", "ABC", "AAAA", "A"])
def test_as_the_reference_weighs_chunks(text, power, form):
    """Fallbacks to fewer included; equal draws share the chance of their chunk."""
    counts = Counter(text)
    n, a = int(power), power - int(power)
    _, weights = _cascade(list(counts.values()), len(text), n, a, form == "factory")
    by_letter = dict(zip(counts, weights, strict=True))
    expected = [by_letter[x] / counts[x] / sum(weights) for x in text]
    found = vote_chances(candidates_of(text), power, form=form)
    assert found.shape == (1, len(text)) and found.dtype == torch.float64
    assert found[0].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("power", [1.25, 2, 2.5, 3, 6])
def test_votes_have_these_frequencies(power):
    text = "ABACABBACD"
    tokens, _ = agreeing_patch(candidates_of(text, ROWS), power, seed=7)
    found = Counter(chr(token) for token in tokens[:, 0].tolist())
    chances = Counter()
    for letter, chance in zip(text, vote_chances(candidates_of(text), power)[0], strict=True):
        chances[letter] += float(chance)
    possible = {letter: chance for letter, chance in chances.items() if chance > 0}
    assert set(found) <= set(possible)
    statistic = sum((found[x] - ROWS * p) ** 2 / (ROWS * p) for x, p in possible.items())
    assert statistic < CHI_SQUARE.get(len(possible) - 1, 1e-9)


def test_every_row_has_a_power_of_its_own():
    candidates = candidates_of("ABACABBACA", 3)
    together = vote_chances(candidates, torch.tensor([1.5, 2.0, 3.0]))
    alone = [vote_chances(candidates[:1], power)[0] for power in (1.5, 2.0, 3.0)]
    assert torch.equal(together, torch.stack(alone))
    plain = torch.full((3, 10), 0.1, dtype=torch.float64)
    torch.testing.assert_close(vote_chances(candidates, 1), plain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3), 2), "candidates must have dtype"),
        ((torch.zeros(2, 3, dtype=torch.int64), 2), "candidates must have shape"),
        ((candidates_of("AB"), 0.5), "num_agreeing must be finite and at least 1"),
    ],
    ids=["dtype", "shape", "power"],
)
def test_mistakes(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        vote_chances(*arguments)
    with pytest.raises(ValueError, match="form must be"):
        vote_chances(candidates_of("AB"), 2, form="other")
