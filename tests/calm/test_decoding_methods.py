"""Sampling methods: independence of batch and backend, caps, heuristics, bad input."""

import itertools

import pytest
import torch
from decoding_distributions import ToyDistribution, check_frequencies, row_seeds, sharpened
from tiny_models import tiny_calm
from torch.utils._python_dispatch import TorchDispatchMode

from calm.decoding.sampling.chunk_distribution import decode
from calm.decoding.sampling.methods import (
    METHODS,
    Batch,
    Direct,
    Exact,
    Medoid,
    NoiseScale,
    build_method,
    medoid,
)
from calm.decoding.sampling.seeds import sequence_seeds
from calm.decoding.sampling.voting import split_power
from calm.errors import UserError
from calm.models.agreement import prefix_collisions
from calm_kernels import agreeing_patch

CPU = torch.device("cpu")


def head_distribution(batch, **fields):
    model = tiny_calm(**fields)
    hidden = torch.randn(batch, 32, generator=torch.Generator().manual_seed(1))
    return model.distribution(hidden)


def build(name, **options):
    return build_method(name, **{"temperature": 1.0 if name == "direct" else 0.5, **options})


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "head"),
    [*((name, head) for name in METHODS for head in ("energy", "flow")), ("direct", "diffusion")],
)
def test_a_sequence_does_not_depend_on_its_batch(name, head):
    batch = 3 if head == "diffusion" else 5
    distribution = head_distribution(batch, head=head)
    method, seed = build(name, num_samples=12, max_draws=60), sequence_seeds(5, batch, CPU)
    given = decode(distribution, distribution.latents(1, seed)[0])
    length = torch.arange(batch) % 4
    together = method.choose(distribution, seed), method.complete(distribution, given, length, seed)
    order = torch.arange(batch).flip(0)
    backwards = (
        method.choose(distribution.select(order), seed[order]),
        method.complete(distribution.select(order), given[order], length[order], seed[order]),
    )
    for row in range(batch):
        here = torch.tensor([row])
        alone = (
            method.choose(distribution.select(here), seed[here]),
            method.complete(distribution.select(here), given[here], length[here], seed[here]),
        )
        for one, other, all_of in zip(alone, backwards, together, strict=True):
            assert torch.equal(one.packed[0], all_of.packed[row])
            assert torch.equal(other.packed[batch - 1 - row], all_of.packed[row])


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.9, 0.5, 0.3])
def test_decoding_token_by_token_makes_the_same_choice_as_decoding_everything(temperature):
    distribution, seed = head_distribution(64, vocab_size=300), sequence_seeds(2, 64, CPU)
    latents = distribution.latents(40, seed)
    tokens, num_agreeing = agreeing_patch(
        decode(distribution, latents).transpose(0, 1), 1 / temperature, seed=seed
    )
    for is_slotwise in (True, False, None):
        method = Batch(temperature=temperature, num_samples=40, is_slotwise=is_slotwise)
        chunk = method.choose(distribution, seed)
        assert torch.equal(chunk.tokens, tokens) and torch.equal(chunk.num_agreeing, num_agreeing)
    assert len(num_agreeing.unique()) > 1


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_one_draw_is_the_same_with_every_method(name):
    """At T = 1, and for votes and medoids of one candidate."""
    distribution, seed = head_distribution(8), sequence_seeds(3, 8, CPU)
    plain = decode(distribution, distribution.latents(1, seed)[0])
    at_one = build_method(name, temperature=1.0, num_samples=50)
    assert isinstance(at_one, Direct) and at_one.is_capturable
    chunk = at_one.choose(distribution, seed)
    assert torch.equal(chunk.tokens, plain)
    assert (
        (chunk.draws == 1).all() and (chunk.num_agreeing == 1).all() and not chunk.is_fallback.any()
    )
    for method in (Batch(num_samples=1), Medoid(num_samples=1), Exact(temperature=1.0)):
        assert torch.equal(method.choose(distribution, seed).tokens, plain)


@torch.no_grad()
def test_another_seed_gives_another_chunk():
    distribution = head_distribution(64)
    for name in METHODS:
        method = build(name, num_samples=8, max_draws=40)
        first, second = (method.choose(distribution, sequence_seeds(s, 64, CPU)) for s in (1, 2))
        assert not torch.equal(first.tokens, second.tokens), name


def uniform_distribution(batch):
    """A thousand chunks of equal probability: many draws practically never agree."""
    number = torch.arange(1000)
    return ToyDistribution([1e-3] * 1000, batch, torch.stack([number // 40, number % 40], 1))


@pytest.mark.parametrize("temperature", [0.1, 0.45, 0.011])
def test_exact_sampling_that_finds_no_agreement_ends_at_its_cap(temperature):
    distribution = uniform_distribution(5)
    method = build_method("exact", temperature=temperature, num_samples=50, max_draws=300)
    chunk = method.choose(distribution, row_seeds(5))
    assert chunk.is_fallback.all() and (chunk.draws - chunk.saved == 300).all()
    assert (chunk.num_agreeing < 1 / temperature).all() and (chunk.num_agreeing >= 1).all()
    assert chunk.saved.min() >= 0 and (chunk.tokens < 40).all()


def test_the_fallback_at_the_cap_is_algorithm_2_over_the_draws_made():
    distribution, seed = uniform_distribution(40), row_seeds(40)
    chunk = build_method("exact", temperature=0.25, num_samples=16, max_draws=16).choose(
        distribution, seed
    )
    expected = Batch(temperature=0.25, num_samples=16).choose(distribution, seed)
    assert chunk.is_fallback.all()
    assert torch.equal(chunk.tokens, expected.tokens) and torch.equal(
        chunk.num_agreeing, expected.num_agreeing
    )


def test_the_medoid_is_the_latent_nearest_to_the_others():
    latents = torch.randn(9, 7, 5, generator=torch.Generator().manual_seed(0)) + 100.0
    counts = torch.tensor([9, 9, 4, 3, 2, 1, 0])
    chosen = medoid(latents, counts)
    for row, count in enumerate(counts.tolist()):
        draws = latents[: max(count, 1), row].double()
        distances = (draws[:, None] - draws).norm(dim=-1).sum(1)
        assert torch.equal(chosen[row], latents[distances.argmin(), row])


def test_the_medoid_decodes_one_candidate_and_narrows_the_distribution():
    rows = 20_000
    chances = (0.1, 0.2, 0.5, 0.2)
    distribution = ToyDistribution(chances, rows)
    chunk = Medoid(num_samples=9).choose(distribution, row_seeds(rows))
    assert distribution.projected == rows * distribution.patch_size
    assert (chunk.draws == 9).all()
    share = torch.bincount(distribution.numbers(chunk.tokens), minlength=4) / rows
    assert share[2] > 0.75 and share[0] < 0.02


def test_the_noise_is_spread_by_the_square_of_t():
    class Recording(ToyDistribution):
        def latents(self, num_samples, seed, **options):
            self.asked = (num_samples, options)
            return super().latents(num_samples, seed, **options)

        def select(self, rows):
            return self

    distribution, zeros = (
        Recording((0.25, 0.25, 0.25, 0.25), 3),
        torch.zeros(3, 2, dtype=torch.int64),
    )
    method = NoiseScale(temperature=0.5, noise_scale=0.7, num_samples=4)
    chunk = method.choose(distribution, row_seeds(3))
    expected = {"noise_scale": 0.7, "noise_spread": 0.25}
    assert distribution.asked == (1, expected) and (chunk.draws == 1).all()
    method.complete(distribution, zeros, zeros[:, 0], row_seeds(3))
    assert distribution.asked == (4, expected)
    Direct().choose(distribution, row_seeds(3))
    assert distribution.asked == (1, {"noise_scale": 1.0, "noise_spread": 1.0})


@torch.no_grad()
@pytest.mark.parametrize("head", ["energy", "flow"])
def test_spreading_the_noise_less_narrows_the_distribution(head):
    """More pairs of draws agree at a lower T."""
    distribution = head_distribution(30, head=head)
    if head == "energy":  # as after training: blocks normalise again, beside a bias of zero
        bias = distribution.head.norm_noise.bias
        bias.copy_(torch.randn(bias.shape, generator=torch.Generator().manual_seed(2)))
    distribution = distribution.select(torch.arange(30).repeat(20))
    seed = row_seeds(600)

    def collision(temperature):
        method = build_method("noise_scale", temperature=temperature)
        return (
            prefix_collisions(method.choose(distribution, seed).tokens.view(20, 30, 4))
            .mean()
            .item()
        )

    shares = [collision(temperature) for temperature in (1.0, 0.6, 0.3, 0.1, 1e-3)]
    assert all(less + 0.005 < more for less, more in itertools.pairwise(shares)), shares
    assert shares[0] < 0.5 and shares[-1] > 0.4


@pytest.mark.parametrize("name", METHODS)
def test_the_noise_is_scaled_for_every_method(name):
    distribution = ToyDistribution((0.25, 0.25, 0.25, 0.25), 200)
    method = build(name, num_samples=8, noise_scale=0.0)
    chunk = method.choose(distribution, row_seeds(200))
    assert (chunk.tokens == 0).all()
    length = torch.ones(200, dtype=torch.int64)
    assert (method.complete(distribution, chunk.tokens, length, row_seeds(200)).tokens == 0).all()


@pytest.mark.parametrize("name", METHODS)
def test_latents_that_are_not_finite_are_flagged(name):
    distribution, seed = ToyDistribution((0.5, 0.3, 0.1, 0.1), 6, damaged=(1, 4)), row_seeds(6)
    method = build(name, num_samples=8)
    zeros = torch.zeros(6, 2, dtype=torch.int64)
    for chunk in (
        method.choose(distribution, seed),
        method.complete(distribution, zeros, zeros[:, 0], seed),
    ):
        assert chunk.is_finite.tolist() == [True, False, True, True, False, True]


@pytest.mark.parametrize(
    ("temperature", "power"),
    [
        (1.0, (1, 0.0)),
        (0.5, (2, 0.0)),
        (1 / 3, (3, 0.0)),
        (0.33333333, (3, 0.0)),
        (0.3333334, (3, 0.0)),
        (0.1, (10, 0.0)),
        (0.4, (2, 0.5)),
        (0.8, (1, 0.25)),
    ],
)
def test_whole_and_fraction_of_the_inverse_temperature(temperature, power):
    whole, fraction = split_power(temperature)
    assert (whole, fraction) == (power[0], pytest.approx(power[1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_draws": 5000.0}, "max_draws must be at least .*, a whole number; got 5000.0"),
        ({"temperature": 0.0}, r"temperature must lie in \(0, 1\], got 0.0"),
        ({"temperature": 1.5}, r"temperature must lie in \(0, 1\], got 1.5"),
        ({"temperature": float("nan")}, r"temperature must lie in \(0, 1\], got nan"),
        ({"num_samples": 0}, "num_samples must be at least 1, a whole number; got 0"),
        ({"num_samples": 2.5}, "num_samples must be at least 1, a whole number; got 2.5"),
        ({"noise_scale": -1.0}, "noise_scale must be finite and at least 0, got -1.0"),
        (
            {"method": "beam"},
            "one of direct, batch, exact, medoid, noise_scale, amortized, readout; got",
        ),
        (
            {"method": "direct"},
            "temperature must be 1, got 0.5; use batch, exact, medoid, noise_scale",
        ),
        ({"max_draws": 199}, "max_draws must be at least 200, which method 'batch' needs"),
        ({"method": "medoid", "max_draws": 0}, "max_draws must be at least 200"),
        (
            {"method": "exact", "temperature": 0.4, "max_draws": 2},
            "must be at least 3, .* 0.4, a whole number; got 2",
        ),
        ({"method": "noise_scale", "max_draws": 0}, "max_draws must be at least 1"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(UserError, match=message):
        build_method(**{"method": "batch", "temperature": 0.5, "num_samples": 200, **options})


def test_the_cap_is_25_waves_unless_given():
    assert build_method("batch", num_samples=40).max_draws == 1000
    assert build_method("exact", temperature=0.01, num_samples=10).max_draws == 250
    with pytest.raises(UserError, match=r"at least 1000, .* got 250 \(by default 25 num_samples\)"):
        build_method("exact", temperature=0.001, num_samples=10)


HOST_READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2"}


class NoHostReads(TorchDispatchMode):
    """Raises where the host would wait for a device, or a shape would depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name not in HOST_READS, func
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize(
    "method",
    [Direct(), NoiseScale(), Medoid(num_samples=8), Batch(num_samples=8, is_slotwise=False),
     Batch(num_samples=8, temperature=0.4, is_slotwise=False)],
    ids=lambda method: type(method).__name__,
)  # fmt: skip
def test_capturable_methods_read_nothing_back(method):
    distribution, seed = head_distribution(4), sequence_seeds(1, 4, CPU)
    assert method.is_capturable
    with NoHostReads():
        method.choose(distribution, seed)


def test_exact_sampling_is_not_captured():
    distribution, seed = head_distribution(2), sequence_seeds(1, 2, CPU)
    assert not Exact().is_capturable
    with pytest.raises(AssertionError), torch.no_grad(), NoHostReads():
        Exact(max_draws=50).choose(distribution, seed)


def test_seeds_of_sequences():
    assert sequence_seeds([3, 4], 2, CPU).tolist() == [[3, 0], [4, 0]]
    assert sequence_seeds(torch.tensor([[3, 9], [4, 9]]), 2, CPU).tolist() == [[3, 9], [4, 9]]
    one = sequence_seeds(torch.tensor([3, 9]), 3, CPU)
    assert one[0].tolist() == [3, 9] and (one[:, 1] == 9).all()
    assert torch.equal(one[:2], sequence_seeds(torch.tensor([3, 9]), 2, CPU))
    many = torch.cat([sequence_seeds(seed, 100, CPU)[:, 0] for seed in range(-50, 50)])
    assert len(many.unique()) == 10_000
    with pytest.raises(UserError, match="seed must hold one number per sequence, 1; got 2"):
        sequence_seeds([1, 2], 1, CPU)
    with pytest.raises(UserError, match="seed must hold one row per sequence, 2; got 3"):
        sequence_seeds(torch.zeros(3, 2, dtype=torch.int64), 2, CPU)


def test_sequences_of_one_seed_draw_independently():
    """Pairs of neighbours in a batch are equal as often as two independent draws are."""
    chances = (0.4, 0.3, 0.2, 0.1)
    distribution = ToyDistribution(chances, 40_000)
    numbers = distribution.numbers(
        Direct().choose(distribution, sequence_seeds(7, 40_000, CPU)).tokens
    )
    check_frequencies(numbers, sharpened(chances, 1.0))
    pairs = numbers[:-1:2] * 4 + numbers[1::2]
    probabilities = torch.tensor(chances, dtype=torch.float64)
    check_frequencies(pairs, (probabilities[:, None] * probabilities).flatten())
