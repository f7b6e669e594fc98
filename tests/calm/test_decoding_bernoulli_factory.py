"""Algorithm 1 over blocks, against the algorithm as a loop over draws."""

import pytest
import torch
from decoding_distributions import row_seeds

from calm.decoding.sampling.bernoulli_factory import factory_stopping_draw, run_rounds
from calm.decoding.sampling.voting import Power
from calm_kernels.noise import Stream, uniform


def loop(draws, stopping, power):
    """Algorithm 1 with early stops: whether a round succeeds, on what draw, used and saved draws.

    The factory of the round that begins at draw i gives up at its draw number `stopping[i]`.
    """
    whole, fraction = power
    begin = saved = 0
    while begin < len(draws):
        chunk, place = draws[begin], begin + 1
        while place < min(begin + whole, len(draws)) and draws[place] == chunk:
            place += 1
        if place == len(draws) and place < begin + whole:
            break
        if place < begin + whole:
            saved += begin + whole - (place + 1)
            begin = place + 1
            continue
        if fraction == 0.0:
            return True, begin, place, saved
        for count in range(1, len(draws) - place + 2):
            if place == len(draws):
                return False, begin, place, saved
            place += 1
            if draws[place - 1] == chunk:
                return True, begin, place, saved
            if count == stopping[begin]:
                break
        begin = place
    return False, begin, len(draws), saved


def make_blocks(power, rows, size, seed):
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(3, (rows, size), generator=generator)
    draws = torch.where(torch.rand(rows, size, generator=generator) < 0.4, 0, draws)
    stopping = torch.randint(1, 6, (rows, size), generator=generator)
    return draws, stopping if power.fraction else None


POWERS = [Power(1, 0.0), Power(1, 0.3), Power(2, 0.0), Power(2, 0.5), Power(4, 0.0), Power(3, 0.9)]


@pytest.mark.parametrize("cuts", [(), (1,), (5, 6), (3, 10, 11, 17)], ids=str)
@pytest.mark.parametrize("power", POWERS, ids=lambda power: f"{power.whole}+{power.fraction}")
def test_blocks_give_the_same_rounds_as_a_loop_over_draws(power, cuts):
    rows, size = 300, 24
    draws, stopping = make_blocks(power, rows, size, seed=len(cuts))
    num_equal = left = torch.zeros(rows, dtype=torch.int64)
    carried_chunk = torch.full((rows, 1), 7)
    used, saved = torch.zeros_like(num_equal), torch.zeros_like(num_equal)
    is_open = torch.ones(rows, dtype=torch.bool)
    found, chunk = torch.zeros_like(is_open), torch.full((rows,), -1)
    begin_stopping = left  # factory_stopping_draw of the unfinished round, drawn where it began
    for start, stop in zip((0, *cuts), (*cuts, size), strict=True):
        block = torch.cat([carried_chunk, draws[:, start:stop]], dim=1)
        here = None
        if stopping is not None:
            here = stopping[:, start:stop]
            carried = torch.where(num_equal == power.whole, left, begin_stopping)
            here = torch.cat([carried[:, None].expand(-1, power.whole), here], dim=1)
        length = torch.full((rows,), stop - start)
        outcome = run_rounds(block, length, power, num_equal=num_equal, stopping_draw=here)
        saved += torch.where(is_open, outcome.saved, 0)
        new = is_open & outcome.is_accepted
        chunk = torch.where(new, block.gather(1, outcome.first[:, None])[:, 0], chunk)
        used += torch.where(new, outcome.used, torch.where(is_open, stop - start, 0))
        found, is_open = found | new, is_open & ~new
        carried_chunk = block.gather(1, outcome.first[:, None])
        num_equal = torch.where(is_open, outcome.num_equal, 0)
        left = outcome.factory_left
        if here is not None:
            index = (outcome.first + power.whole - 1).clamp(min=0)[:, None]
            begin_stopping = here.gather(1, index)[:, 0]
    for row in range(rows):
        told = None if stopping is None else stopping[row].tolist()
        is_found, begin, count, without = loop(draws[row].tolist(), told, power)
        assert found[row] == is_found and used[row] == count and saved[row] == without
        assert not is_found or chunk[row] == draws[row, begin]
    assert found.any() and (power.whole < 3 or not found.all())


def test_draws_beyond_the_length_do_not_count():
    power, rows = Power(2, 0.5), 200
    draws, stopping = make_blocks(power, rows, 20, seed=9)
    stopping = torch.cat([stopping[:, :2], stopping], dim=1)
    zero = torch.zeros(rows, dtype=torch.int64)
    padded = torch.cat([zero[:, None], draws], dim=1)
    length = torch.arange(rows) % 21
    padded_outcome = run_rounds(padded, length, power, num_equal=zero, stopping_draw=stopping)
    for size in range(21):
        part = run_rounds(
            padded[:, : size + 1],
            zero + size,
            power,
            num_equal=zero,
            stopping_draw=stopping[:, : size + 2],
        )
        same = length == size
        for name in ("is_accepted", "num_equal", "saved"):
            assert torch.equal(getattr(part, name)[same], getattr(padded_outcome, name)[same]), name
        done = same & part.is_accepted
        assert torch.equal(part.used[done], padded_outcome.used[done])
        assert torch.equal(part.first[done], padded_outcome.first[done])


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.95])
def test_the_stopping_draw_has_the_probabilities_of_the_factory(fraction):
    """P(factory_stopping_draw > k) = prod_{j <= k} (1 - a/j)."""
    drawn = uniform(200_000, 1, stream=Stream.FACTORY, seed=row_seeds(200_000), dtype=torch.float64)
    waited = factory_stopping_draw(drawn, fraction, 50)
    survival = 1.0
    for step in range(1, 51):
        survival *= 1.0 - fraction / step
        error = (waited > step).double().mean().item() - survival
        assert abs(error) < 4 * (survival * (1 - survival) / 200_000) ** 0.5, step
    assert waited.min() >= 1 and waited.max() == 51


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.95])
def test_the_stopping_draw_beyond_its_table(fraction, monkeypatch):
    """What follows the table is the same distribution; a cap of any size costs no memory."""
    drawn = uniform(50_000, 1, stream=Stream.FACTORY, seed=row_seeds(50_000), dtype=torch.float64)
    table = factory_stopping_draw(drawn, fraction, 5000)
    monkeypatch.setattr("calm.decoding.sampling.bernoulli_factory.TABLE_SIZE", 200)
    assert (factory_stopping_draw(drawn, fraction, 5000) != table).double().mean() < 1e-3
    limit = 10**14
    waited = factory_stopping_draw(drawn, fraction, limit)
    assert torch.equal(waited.clamp(max=201), table.clamp(max=201)) and waited.max() <= limit + 1
    assert factory_stopping_draw(torch.zeros(1, dtype=torch.float64), fraction, limit).tolist() == [
        limit + 1
    ]
