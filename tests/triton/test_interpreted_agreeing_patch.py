"""The voting kernels against the torch backend: the same choices, levels and counts."""

import pytest
import torch

from calm_kernels import agreeing_patch
from calm_kernels.agreeing_patch import api, function

OPERATORS = torch.ops.calm_kernels


def assert_same_choices(candidates, num_agreeing, **options):
    options = {"return_counts": True, **options}
    ours = agreeing_patch(candidates, num_agreeing, backend="triton", **options)
    theirs = agreeing_patch(candidates, num_agreeing, backend="torch", **options)
    for name, mine, other in zip(("tokens", "level", "counts"), ours, theirs, strict=True):
        assert torch.equal(mine, other) and mine.dtype == other.dtype, name


def draw(shape, distinct, generator, dtype=torch.int64):
    """Patches of which some are frequent."""
    return (torch.rand(shape, generator=generator) ** 2 * distinct).to(dtype)


@pytest.mark.parametrize("form", ["factory", "gamma"])
@pytest.mark.parametrize("num_agreeing", [1, 3, 2.5, 12.7])
def test_choices_of_many_rows(num_agreeing, form, generator):
    candidates = draw((40, 12, 2), 3, generator)
    assert_same_choices(candidates, num_agreeing, form=form, seed=3, first_row=7)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
@pytest.mark.parametrize(
    "shape", [(3, 200, 4), (2, 256, 1), (2, 257, 3), (2, 65, 64), (2, 9, 13), (3, 1, 2), (0, 5, 2)],
    ids=str,
)  # fmt: skip
def test_shapes_and_dtypes(shape, dtype, generator):
    candidates = draw(shape, 2 if shape[2] < 13 else 1.1, generator, dtype)
    assert_same_choices(candidates, 2.5, seed=5)


def test_extreme_tokens_and_equal_parts():
    """All 64 bits count; so does the place of a token."""
    high, low = 2**63 - 1, -(2**63)
    rows = [[high, low], [low, high], [high, low], [0, low], [high - 2**32, low], [low, high]]
    assert_same_choices(torch.tensor([rows]).expand(32, -1, -1), 1, seed=2)


def test_more_candidates_than_a_program_holds(monkeypatch, generator):
    monkeypatch.setattr(function, "MAX_CANDIDATES", 50)
    candidates = draw((20, 51, 2), 4, generator)
    assert_same_choices(candidates, 2.5, seed=5, first_row=3)


def test_large_counts_do_not_overflow():
    """C(1200, 600) is about 1e360."""
    candidates = (torch.arange(1300) >= 1200).long()[None, :, None]
    assert_same_choices(candidates, 600.5, seed=1)


@pytest.mark.parametrize("numbers", [[3.0], [1.0, 2.0, 2.5, 3.7, 0.2]], ids=["one", "a row each"])
def test_numbers_on_the_device(numbers, generator, monkeypatch):
    """Values below 1 count as 1 where they are not read."""
    monkeypatch.setattr(api, "_check_number", float)
    candidates = draw((5, 20, 2), 3, generator)
    assert_same_choices(candidates, torch.tensor(numbers), seed=2)


def test_a_seed_per_row_and_rows_on_the_device(generator):
    candidates = draw((20, 15, 2), 3, generator)
    seeds = torch.stack([torch.arange(20) - 10, torch.arange(20) * 2**33], 1)
    assert_same_choices(candidates, 2, seed=seeds)
    assert_same_choices(candidates, 2, seed=seeds[:2].clone()[0], first_row=torch.tensor(2**31))


def test_strided_candidates(generator):
    """As the head draws them: samples first."""
    candidates = draw((30, 16, 3), 2, generator).transpose(0, 1)
    assert not candidates.is_contiguous()
    assert_same_choices(candidates, 2, seed=1)
    assert_same_choices(candidates[:, ::2, ::2], 2, seed=1)


def test_operators_keep_their_contract(generator):
    candidates = draw((4, 10, 2), 2, generator)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPERATORS.count_chunks.default, (candidates,), test_utils=tests)
    arguments = (
        candidates, OPERATORS.count_chunks(candidates), torch.tensor(2.5).double().expand(4),
        torch.tensor([1, 0]), torch.tensor(0), 0, True,
    )  # fmt: skip
    torch.library.opcheck(OPERATORS.choose_chunk.default, arguments, test_utils=tests)


def test_one_graph_under_compile(generator):
    candidates, seed = draw((4, 15, 2), 3, generator), torch.tensor([1, 0])

    def function(candidates, number):
        return agreeing_patch(candidates, number, seed=seed, return_counts=True, backend="triton")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    number = torch.tensor(2.5)
    for ours, theirs in zip(
        compiled(candidates, number), function(candidates, number), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_seed_for_other_rows_is_refused():
    with pytest.raises(ValueError, match="seed has 3 rows for 2"):
        agreeing_patch(
            torch.zeros(2, 3, 1).long(), 2, seed=torch.zeros(3, 2).long(), backend="triton"
        )
