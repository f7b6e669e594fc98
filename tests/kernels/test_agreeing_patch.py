"""Low-temperature choice among candidates: the law, the cascade, the draws."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import pytest
import torch
from helpers import LargestOutput

from calm_kernels import agreeing_patch
from calm_kernels.agreeing_patch import reference

FORMS = ("factory", "gamma")
# Upper 1e-4 quantile of chi-square by degrees of freedom: seeded, so a failure is an error.
CHI_SQUARE = {1: 15.14, 2: 18.42, 3: 21.11}


def candidates_of(text, batch=1):
    """``[batch, len(text), 2]``: each letter is a patch of two tokens."""
    row = torch.tensor([[ord(letter), ord(letter) + 1000] for letter in text])
    return row.expand(batch, *row.shape)


ROWS = {"reference": 20_000, "torch": 100_000}


def frequencies(text, num_agreeing, *, backend, **options):
    """How often each letter of `text` is chosen, over many independent rows."""
    candidates = candidates_of(text, ROWS[backend])
    tokens, _ = agreeing_patch(candidates, num_agreeing, seed=7, backend=backend, **options)
    return Counter(chr(token) for token in tokens[:, 0].tolist())


def assert_follows(counts, law):
    """`counts` are drawn from `law` (letter to probability)."""
    assert set(counts) <= {letter for letter, chance in law.items() if chance > 0}
    total = sum(counts.values())
    law = {letter: chance for letter, chance in law.items() if chance > 0}
    statistic = sum((counts[x] - total * p) ** 2 / (total * p) for x, p in law.items())
    assert statistic < CHI_SQUARE.get(len(law) - 1, 1e-9), statistic


def normalised(weights):
    total = sum(weights.values())
    return {letter: float(weight / total) for letter, weight in weights.items()}


def acceptance(hits, others, a):
    """Chance that stage 2 of Algorithm 1 accepts, by going through every order of the draws."""
    total = Fraction(0)
    orders = list(itertools.combinations(range(others), hits))
    for positions in orders:
        survival = Fraction(1)
        for draw in range(1, min(positions, default=others) + 1):  # misses before the first match
            survival *= 1 - a / draw
        total += survival if positions else 0
    return total / len(orders)


@pytest.mark.parametrize(
    ("text", "n", "law"),
    [
        ("ABABA", 2, {"A": 3 / 4, "B": 1 / 4}),  # C(3, 2) = 3 and C(2, 2) = 1
        ("AABBC", 1, {"A": 2 / 5, "B": 2 / 5, "C": 1 / 5}),
        ("AAAABBBC", 3, {"A": 4 / 5, "B": 1 / 5}),
        ("AAAABBBC", 4, {"A": 1.0}),
        ("ABBA", 3, {"A": 1 / 2, "B": 1 / 2}),  # no patch occurs three times: pairs decide
        ("ABC", 5, {"A": 1 / 3, "B": 1 / 3, "C": 1 / 3}),
    ],
)
def test_law_of_algorithm_2(text, n, law, backend):
    assert_follows(frequencies(text, n, backend=backend), law)


@pytest.mark.parametrize("a", [Fraction(1, 10), Fraction(1, 2), Fraction(9, 10)], ids=float)
def test_law_of_the_factory_form(a, backend):
    counts = Counter("AAAABBBCC")
    weights = {x: math.comb(c, 2) * acceptance(c - 2, 7, a) for x, c in counts.items()}
    assert weights["C"] == 0  # both its draws are used up
    text = "ABACABBAC"
    assert_follows(frequencies(text, 2 + float(a), backend=backend), normalised(weights))


@pytest.mark.parametrize("a", [0.1, 0.5, 0.9])
def test_law_of_the_gamma_form(a, backend):
    counts = Counter("AAAABBBCC")
    weights = {x: math.gamma(c + 1) / math.gamma(c - 1 - a) for x, c in counts.items()}
    law = normalised(weights)
    assert_follows(frequencies("ABACABBAC", 2 + a, form="gamma", backend=backend), law)


@pytest.mark.parametrize(
    ("text", "form", "law"),
    [
        ("AABBC", "factory", {"A": 1 / 2, "B": 1 / 2}),
        ("ABC", "factory", {"A": 1 / 3, "B": 1 / 3, "C": 1 / 3}),
        ("AABBC", "gamma", {"A": 1 / 2, "B": 1 / 2}),
        ("ABC", "gamma", {"A": 1 / 3, "B": 1 / 3, "C": 1 / 3}),
    ],
)
def test_law_at_the_fallback_levels_of_a_fraction(text, form, law, backend):
    """A level that was fallen to leaves only the most frequent patches, each alike."""
    assert_follows(frequencies(text, 2.5, form=form, backend=backend), law)


def test_the_factory_weight_is_unbiased_but_for_what_it_leaves_undecided():
    """E[w] = C(N, n) pⁿ (pᵃ - undecided), summed over all sequences of N draws."""
    law, total, n, a = {"A": 0.5, "B": 0.3, "C": 0.2}, 6, 2, 0.5
    for letter, p in law.items():
        mean = 0.0
        for draws in itertools.product(law, repeat=total):
            counts = [draws.count(x) for x in law]
            weight = reference._weights(counts, total, n, a, is_factory=True)["ABC".index(letter)]
            largest = math.comb(max(counts), n)  # what the weights are relative to
            mean += math.prod(law[x] for x in draws) * weight * largest
        undecided, survival = 0.0, 1.0
        for misses in range(400):
            if misses >= total - n:
                undecided += p * (1 - p) ** misses * survival
            survival *= 1 - a / (misses + 1)
        expected = math.comb(total, n) * p**n * (p**a - undecided)
        assert mean == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_large_samples_approach_the_power_law(form, generator):
    law, power = torch.tensor([0.5, 0.25, 0.15, 0.1]), 2.5
    drawn = torch.multinomial(law.expand(2000, 4), 500, replacement=True, generator=generator)
    tokens, level = agreeing_patch(drawn[..., None], power, seed=1, form=form, backend="torch")
    target = law**power / (law**power).sum()
    share = tokens[:, 0].bincount(minlength=4) / 2000
    assert (share - target).abs().max() < 0.03
    assert (level == 2).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_agreeing", [1, 2, 3, 6, 1.3, 2.5, 3.999, 12.7])
@pytest.mark.parametrize("shape", [(40, 9, 3), (7, 257, 2), (20, 1, 4), (15, 30, 1)], ids=str)
def test_backends_agree_draw_by_draw(shape, num_agreeing, form, generator):
    candidates = torch.randint(2, shape, generator=generator)
    options = {"seed": 3, "form": form, "return_counts": True}
    ours = agreeing_patch(candidates, num_agreeing, backend="torch", **options)
    theirs = agreeing_patch(candidates, num_agreeing, backend="reference", **options)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other) and mine.dtype == other.dtype


def test_counts_and_level(backend):
    tokens, level, counts = agreeing_patch(
        candidates_of("ABACA"), 2, seed=0, return_counts=True, backend=backend
    )
    assert counts.tolist() == [[3, 1, 3, 1, 3]]
    assert level.tolist() == [2]
    assert tokens.tolist() == [[ord("A"), ord("A") + 1000]]


@pytest.mark.parametrize(
    ("text", "num_agreeing", "form", "expected"),
    [
        ("AAAB", 2, "factory", 2),
        ("AAAB", 7, "factory", 3),  # no more than three agree
        ("ABCD", 3, "factory", 1),
        ("AAAB", 2.5, "factory", 2),
        ("AABB", 2.5, "factory", 1),  # a third one is needed beyond the pair
        ("AABB", 2.5, "gamma", 2),
        ("ABCD", 1.5, "factory", 0),  # nothing agrees: by count
        ("ABCD", 1.5, "gamma", 1),
        ("A", 1.5, "factory", 0),
        ("A", 1, "factory", 1),
    ],
)
def test_level_of_the_cascade(text, num_agreeing, form, expected, backend):
    _, level = agreeing_patch(candidates_of(text), num_agreeing, seed=0, form=form, backend=backend)
    assert level.tolist() == [expected]


def test_numbers_near_an_integer_are_that_integer(backend, generator):
    candidates = torch.randint(2, (200, 12, 2), generator=generator)
    exact = agreeing_patch(candidates, 3, seed=5, backend=backend)
    for number in (2.9999999, 3.0 + 1e-10, 1 / (1 / 3), torch.tensor(1.0) / torch.tensor(1 / 3)):
        for ours, theirs in zip(
            agreeing_patch(candidates, number, seed=5, backend=backend), exact, strict=True
        ):
            assert torch.equal(ours, theirs)


def test_patches_that_share_tokens_are_not_equal(backend):
    """Neither a shared first or last token, nor the same tokens in another order, is agreement."""
    candidates = torch.tensor([[[1, 2], [2, 1], [1, 1], [2, 2], [1, 2]]])
    _, _, counts = agreeing_patch(candidates, 2, seed=0, return_counts=True, backend=backend)
    assert counts.tolist() == [[2, 1, 1, 1, 2]]


def test_extreme_tokens(backend):
    high, low = 2**63 - 1, -(2**63)
    candidates = torch.tensor([[[high, low], [low, high], [high, low], [0, low]]])
    tokens, level = agreeing_patch(candidates, 2, seed=0, backend=backend)
    assert tokens.tolist() == [[high, low]] and level.tolist() == [2]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_agreeing", [600, 600.5])
def test_large_counts_do_not_overflow(num_agreeing, form, backend):
    """C(1200, 600) is about 1e360."""
    candidates = torch.zeros(2, 2000, 1, dtype=torch.int64)
    candidates[:, 1200:] = 1  # 1200 against 800 occurrences
    tokens, level = agreeing_patch(candidates, num_agreeing, seed=1, form=form, backend=backend)
    assert not tokens.any() and (level == 600).all()


@pytest.mark.parametrize("shape", [(), (1,), (4,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64], ids=str)
def test_num_agreeing_as_a_tensor(shape, dtype, backend, generator):
    candidates = torch.randint(3, (4, 20, 2), generator=generator)
    number = torch.full(shape, 3, dtype=dtype)
    expected = agreeing_patch(candidates, 3, seed=2, backend=backend)
    for ours, theirs in zip(
        agreeing_patch(candidates, number, seed=2, backend=backend), expected, strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_temperature_for_each_row(backend, generator):
    candidates = torch.randint(2, (5, 20, 2), generator=generator)
    numbers = torch.tensor([1.0, 2.0, 2.5, 3.7, 30.0])
    tokens, level = agreeing_patch(candidates, numbers, seed=2, backend=backend)
    for row, number in enumerate(numbers.tolist()):
        alone = agreeing_patch(
            candidates[row : row + 1], number, seed=2, first_row=row, backend=backend
        )
        assert torch.equal(tokens[row], alone[0][0]) and level[row] == alone[1][0]


def test_any_split_of_the_batch_chooses_the_same(backend, generator):
    candidates = torch.randint(3, (9, 15, 2), generator=generator)
    whole, _ = agreeing_patch(candidates, 2, seed=4, first_row=100, backend=backend)
    parts = [agreeing_patch(candidates[rows], 2, seed=4, first_row=100 + rows.start,
                            backend=backend)[0] for rows in (slice(0, 4), slice(4, 9))]  # fmt: skip
    assert torch.equal(torch.cat(parts), whole)


def test_a_seed_per_row_makes_rows_independent_of_the_batch(backend, generator):
    candidates = torch.randint(3, (6, 15, 2), generator=generator)
    seeds = torch.arange(50, 56)
    together, _ = agreeing_patch(candidates, 2, seed=seeds, backend=backend)
    order = torch.tensor([4, 1, 5])
    apart, _ = agreeing_patch(candidates[order], 2, seed=seeds[order], backend=backend)
    assert torch.equal(apart, together[order])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_tokens_keep_their_dtype(dtype, backend, generator):
    candidates = torch.randint(3, (4, 15, 2), generator=generator).to(dtype)
    tokens, level = agreeing_patch(candidates, 2, seed=1, backend=backend)
    assert tokens.dtype == dtype and tokens.shape == (4, 2)
    assert level.dtype == torch.int64 and level.shape == (4,)


def test_empty_batch(backend):
    tokens, level, counts = agreeing_patch(
        torch.zeros(0, 5, 3, dtype=torch.int64), 2, seed=1, return_counts=True, backend=backend
    )
    assert tokens.shape == (0, 3) and level.shape == (0,) and counts.shape == (0, 5)


def test_strided_candidates(backend, generator):
    candidates = torch.randint(2, (4, 15, 3), generator=generator)
    strided = candidates.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    expected = agreeing_patch(candidates, 2, seed=1, backend=backend)
    for ours, theirs in zip(
        agreeing_patch(strided, 2, seed=1, backend=backend), expected, strict=True
    ):
        assert torch.equal(ours, theirs)


def test_memory_grows_with_the_candidates_not_their_pairs():
    candidates = torch.randint(3, (2, 1000, 4))
    with LargestOutput() as largest:
        agreeing_patch(candidates, 2.5, seed=1, backend="torch")
    assert largest.numel <= candidates.numel()


def test_compiles_to_one_graph(generator):
    candidates = torch.randint(3, (4, 15, 2), generator=generator)
    seed = torch.tensor([1, 0])

    def function(candidates):
        return agreeing_patch(candidates, 2.5, seed=seed, backend="torch")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(candidates), function(candidates), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"candidates": torch.zeros(2, 3).long()}, ValueError, r"\[B, N, K\].*\(2, 3\)"),
        ({"candidates": torch.zeros(2, 0, 3).long()}, ValueError, r"N, K >= 1.*\(2, 0, 3\)"),
        ({"candidates": torch.zeros(2, 3, 0).long()}, ValueError, r"N, K >= 1.*\(2, 3, 0\)"),
        (
            {"candidates": torch.zeros(2, 3, 1)},
            TypeError,
            "candidates must have dtype int64.*float",
        ),
        ({"num_agreeing": 0.5}, ValueError, "num_agreeing must be finite and at least 1.*0.5"),
        ({"num_agreeing": math.inf}, ValueError, "num_agreeing.*inf"),
        ({"num_agreeing": math.nan}, ValueError, "num_agreeing.*nan"),
        ({"num_agreeing": True}, TypeError, "num_agreeing must be a number or a tensor, got bool"),
        ({"num_agreeing": "2"}, TypeError, "num_agreeing.*str"),
        ({"num_agreeing": torch.tensor([2.0, 0.5])}, ValueError, "num_agreeing.*0.5"),
        ({"num_agreeing": torch.ones(3)}, ValueError, r"one number or 2.*\(3,\)"),
        ({"num_agreeing": torch.ones(2).bool()}, TypeError, "num_agreeing must have dtype.*bool"),
        ({"form": "plain"}, ValueError, "form must be 'factory' or 'gamma', got 'plain'"),
        ({"seed": torch.zeros(3, 2).long()}, ValueError, "seed has 3 rows for 2"),
    ],
)
def test_bad_input(changes, error, message, backend):
    arguments = {"candidates": torch.zeros(2, 3, 1).long(), "num_agreeing": 2, "seed": 0, **changes}
    with pytest.raises(error, match=message):
        agreeing_patch(**arguments, backend=backend)
