"""Philox noise: the published vectors, the distributions and the addresses of the draws."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from calm_kernels import noise
from calm_kernels.noise import Stream, as_first_row, as_seed, normal, philox, uniform

MASK = 0xFFFFFFFF
draws = pytest.mark.parametrize("draw", [uniform, normal])


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123, tests/kat_vectors, philox4x32 10
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([MASK] * 4, [MASK] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_published_vectors(counter, key, expected):
    words = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert [word.item() for word in words] == expected


def test_what_a_counter_names():
    """(draw and word, row, offset low, offset high), keyed by (seed low, seed high xor stream)."""
    seed, offset, row, draw, words = 0x123456789ABCDEF0, (5 << 32) + 6, 1000, 3, 2
    key = (seed & MASK, (seed >> 32) ^ int(Stream.HEAD))
    outputs = philox(
        tuple(map(torch.tensor, ([draw * words, draw * words + 1], [row] * 2, [6] * 2, [5] * 2))),
        tuple(map(torch.tensor, key)),
    )
    expected = torch.cat([(word >> 8).float() / 2**24 for word in outputs])
    actual = uniform(
        1,
        8,
        stream=Stream.HEAD,
        seed=torch.tensor([seed, offset]),
        num_draws=1,
        first_row=row,
        first_draw=draw,
    )
    assert torch.equal(actual[0, 0], expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@draws
def test_draws_can_be_transformed_and_traced(draw):
    """The values of a seed are never read."""

    def drawn(seed):
        return draw(2, 8, stream=Stream.HEAD, seed=seed)

    seeds = torch.tensor([[[1, 2], [3, 4]], [[5, 6], [7, 8]], [[9, 10], [11, 12]]])
    expected = torch.stack([drawn(seed) for seed in seeds])
    assert torch.equal(torch.vmap(drawn)(seeds), expected)
    with FakeTensorMode(allow_non_fake_inputs=True):
        drawn(seeds[0])
    traced = make_fx(drawn)(seeds[0])
    assert torch.equal(traced(seeds[1]), expected[1])


def test_normal_of_a_word():
    """Box-Muller on 20 and 12 bits, the cosine first."""
    words = philox(
        tuple(map(torch.tensor, (0, 0, 0, 0))), tuple(map(torch.tensor, (7, int(Stream.LATENT))))
    )
    expected = []
    for word in (word.item() for word in words):
        radius = math.sqrt(-2 * math.log(((word >> 12) + 0.5) / 2**20))
        angle = 2 * math.pi * ((word & 0xFFF) + 0.5) / 2**12 - math.pi
        expected += [radius * math.cos(angle), radius * math.sin(angle)]
    actual = normal(1, 8, stream=Stream.LATENT, seed=7)
    # log, root, sine and a product of numbers up to 5.4, each within 2 eps: 8 eps, rounded up.
    torch.testing.assert_close(actual[0], torch.tensor(expected), rtol=1e-5, atol=1e-6)


def kolmogorov_smirnov(values, distribution):
    """√n times the largest distance between empirical and true distribution function."""
    values = values.flatten().double().sort().values
    n = values.numel()
    levels, steps = distribution(values), torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((steps[1:] - levels).max(), (levels - steps[:-1]).max())
    return math.sqrt(n) * distance.item()


class TestLaws:
    COUNT = (400, 64)

    def test_uniform(self):
        values = uniform(*self.COUNT, stream=Stream.HEAD, seed=1, num_draws=8)
        assert 0 <= values.min() < 1e-4
        assert 1 - 1e-4 < values.max() < 1
        assert kolmogorov_smirnov(values, lambda v: v) < 1.63  # the 1 % point
        n = values.numel()
        assert abs(values.mean() - 0.5) < 4 / math.sqrt(12 * n)
        assert abs(values.var() - 1 / 12) < 4 / math.sqrt(180 * n)

    def test_normal(self):
        values = normal(*self.COUNT, stream=Stream.TARGETS, seed=2, num_draws=8)
        assert values.abs().max() < 5.4
        # radii have 20 bits and angles 12: far more exact than this sample can see
        assert kolmogorov_smirnov(values, torch.special.ndtr) < 1.63
        n = values.numel()
        for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            error = values.double().pow(power).mean().item() - moment
            assert abs(error) < 4 * math.sqrt(variance / n), power

    @draws
    def test_independence(self, draw):
        """Streams, seeds, offsets, rows, draws and elements do not correlate."""
        n = 20_000

        def row(**options):
            defaults = {"stream": Stream.HEAD, "seed": torch.tensor([3, 0]), "first_row": 5}
            return draw(1, n, **defaults | options)[0]

        base = row()
        others = {
            "stream": row(stream=Stream.TARGETS),
            "seed": row(seed=torch.tensor([4, 0])),
            "seed's high word": row(seed=torch.tensor([3 + (1 << 32), 0])),
            "offset": row(seed=torch.tensor([3, 1])),
            "row": row(first_row=6),
            "draw": row(first_draw=1),
            "next element": base.roll(1),
            "element of the next word": base.roll(n // 8),
        }
        for name, other in others.items():
            correlation = torch.corrcoef(torch.stack([base, other]))[0, 1]
            assert abs(correlation) < 4 / math.sqrt(n), name

    def test_a_pair_of_one_word(self):
        """The two normals of a word are independent in size too, not only uncorrelated."""
        values = normal(500, 64, stream=Stream.HEAD, seed=4)  # slices of 8: word w in 2w, 2w + 1
        cosine, sine = values.view(500, 8, 8)[:, 0], values.view(500, 8, 8)[:, 1]
        sizes = torch.stack([cosine.flatten().square(), sine.flatten().square()])
        assert abs(torch.corrcoef(sizes)[0, 1]) < 4 / math.sqrt(sizes.shape[1])


@draws
class TestAddressing:
    def make(self, draw, rows=7, width=13, **options):
        return draw(rows, width, **{"stream": Stream.HEAD, "seed": 5} | options)

    def test_same_address_same_bits(self, draw):
        assert torch.equal(self.make(draw), self.make(draw))

    def test_rows(self, draw):
        whole = self.make(draw, num_draws=3)
        for cut in (1, 4, 7):
            first = self.make(draw, rows=cut, num_draws=3)
            rest = self.make(draw, rows=7 - cut, num_draws=3, first_row=torch.tensor(cut))
            assert torch.equal(torch.cat([first, rest], dim=1), whole)

    def test_draws(self, draw):
        whole = self.make(draw, num_draws=5)
        parts = [self.make(draw, num_draws=n, first_draw=f) for f, n in ((0, 2), (2, 3))]
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(self.make(draw), whole[0])
        assert torch.equal(self.make(draw, first_draw=4), whole[4])

    def test_rows_have_no_end(self, draw):
        """Row indices beyond 31 bits stay distinct: a long run does not repeat itself."""
        far = self.make(draw, first_row=(1 << 31) - 3)
        assert len(far.unique(dim=0)) == 7

    @pytest.mark.parametrize("width", [1, 3, 4, 8, 9, 64])
    def test_widths(self, draw, width):
        values = self.make(draw, width=width, num_draws=4)
        assert values.shape == (4, 7, width)
        assert values.unique().numel() > 0.9 * values.numel()
        assert values.stride(1) >= values.stride(0) >= values.stride(2) == 1  # memory by rows

    def test_seed_of_each_row(self, draw):
        seeds = torch.tensor([[5, 0], [6, 0], [5, 2]])
        rows = self.make(draw, rows=3, seed=seeds, first_row=4, num_draws=2)
        for index, seed in enumerate(seeds):
            alone = self.make(draw, rows=1, seed=seed, first_row=4, num_draws=2)
            assert torch.equal(rows[:, index : index + 1], alone)
        without_offset = self.make(draw, rows=3, seed=torch.tensor([5, 6, 5]), first_row=4)
        assert torch.equal(without_offset[:2], rows[0, :2])
        assert torch.equal(without_offset[0], without_offset[2])

    def test_unseeded(self, draw):
        torch.manual_seed(3)
        first, second = self.make(draw, seed=None), self.make(draw, seed=None)
        torch.manual_seed(3)
        assert torch.equal(first, self.make(draw, seed=None))
        assert not torch.equal(first, second)

    def test_none(self, draw):
        assert self.make(draw, rows=0, num_draws=2).shape == (2, 0, 13)
        assert self.make(draw, num_draws=0).shape == (0, 7, 13)

    def test_dtype(self, draw):
        single = self.make(draw)
        assert torch.equal(self.make(draw, dtype=torch.float64), single.double())
        assert torch.equal(self.make(draw, dtype=torch.bfloat16), single.bfloat16())

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"rows": -1}, ValueError, "num_rows must be at least 0"),
            ({"rows": 2.0}, TypeError, "num_rows must be an integer"),
            ({"width": 0}, ValueError, "width must be at least 1"),
            ({"num_draws": -1}, ValueError, "num_draws must be at least 0"),
            ({"first_draw": -1}, ValueError, "first_draw must be at least 0"),
            ({"first_row": True}, TypeError, "first_row must be an integer, got bool"),
            ({"first_row": -(2**63) - 1}, ValueError, "first_row must fit into 64 bits"),
            ({"first_row": torch.tensor(0.0)}, TypeError, "first_row must .*, got torch.float32"),
            ({"seed": torch.zeros(4, dtype=torch.int64)}, ValueError, "seed has 4 rows for 7"),
        ],
    )
    def test_bad_input(self, draw, options, error, message):
        with pytest.raises(error, match=message):
            self.make(draw, **options)


class TestAsSeed:
    @pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
    def test_integers(self, seed):
        assert as_seed(seed, "cpu").tolist() == [seed, 0]

    def test_tensors(self):
        for given, shape in (([1, 2], (2,)), ([1, 2, 3], (3, 2)), ([[1], [2]], (2, 2))):
            assert as_seed(torch.tensor(given), "cpu").shape == shape
        assert as_seed(torch.tensor([4]), "cpu").tolist() == [[4, 0]]

    @pytest.mark.parametrize(
        ("seed", "error", "message"),
        [
            (1.0, TypeError, "seed must be an int, an int64 tensor or None, got float"),
            (True, TypeError, "got bool"),
            ("1", TypeError, "got str"),
            (2**63, ValueError, "64 bits"),
            (torch.tensor([1, 2], dtype=torch.int32), TypeError, "seed must have dtype int64"),
            (torch.tensor(1), ValueError, r"seed must have shape .*\(\)"),
            (torch.ones(2, 3, dtype=torch.int64), ValueError, r"\(2, 3\)"),
            (torch.ones(2, 2, 2, dtype=torch.int64), ValueError, r"\(2, 2, 2\)"),
        ],
    )
    def test_bad_input(self, seed, error, message):
        with pytest.raises(error, match=message):
            as_seed(seed, "cpu")


class TestFirstRow:
    @pytest.fixture
    def fills(self, monkeypatch):
        """Numbers that were filled into memory, from an empty cache."""
        found, full = [], torch.full
        monkeypatch.setattr(torch, "full", lambda *a, **k: found.append(a[1]) or full(*a, **k))
        noise._kept.cache_clear()
        return found

    def test_an_integer_is_filled_once(self, fills):
        device = torch.device("cpu")
        rows = [as_first_row(number, device) for number in (7, 2**40, 7, 7, 2**40)]
        assert [row.item() for row in rows] == [7, 2**40, 7, 7, 2**40] and fills == [7, 2**40]
        assert all(row.dtype == torch.int64 and row.dim() == 0 for row in rows)
        given = torch.tensor(3)
        assert as_first_row(given, device) is given

    def test_nothing_is_kept_of_a_mode(self, fills):
        with FakeTensorMode():
            assert type(as_first_row(7, torch.device("cpu"))).__name__ == "FakeTensor"
        assert as_first_row(7, torch.device("cpu")).item() == 7 and fills == [7, 7]

    def test_what_inference_has_made_serves_a_gradient(self, fills):
        with torch.inference_mode():
            row = as_first_row(7, torch.device("cpu"))
        assert not row.is_inference()
