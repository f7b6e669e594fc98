"""Weights of targets: any real numbers, against the float64 reference, and what they optimise."""

import pytest
import torch
from energy_cases import EXPONENTS, TOLERANCES, assert_as_reference, differentiate

from calm_kernels.energy_score import energy_score, gaussian_energy_score, row_blocks

# N, M or G, L: least, odd, and beyond 64, where a CPU takes matmuls.
SIZES = [(2, 1, 1), (3, 3, 9), (4, 2, 64)]
sizes = pytest.mark.parametrize(
    ("n", "m", "width"), SIZES, ids=[f"N{n}-M{m}-L{w}" for n, m, w in SIZES]
)
dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype)[6:])
ROWS = (3, 2)


def make_weights(m, generator):
    """Those of a distribution, signed, huge, one target alone; and some are zero."""
    weights = torch.rand(m, *ROWS, generator=generator, dtype=torch.float64)
    weights /= weights.sum(0)
    weights[:, 0, 1] = 3 * torch.randn(m, generator=generator, dtype=torch.float64) + 0.1
    weights[:, 1, 0] *= 1e6
    weights[1:, 1, 1] = 0
    return weights.float().double()


def make_targets(kind, m, width, generator):
    """What the score takes besides samples: targets ``[M, ..., L]``, or mean and log_std."""
    options = {"generator": generator, "dtype": torch.float64}
    places = torch.randn(m, *ROWS, width, **options)
    if kind == "given":
        return [places]
    return [places, 0.3 * torch.randn(m, *ROWS, width, **options)]


def scored(samples, targets, weights, **options):
    if len(targets) == 1:
        return energy_score(samples, *targets, target_weights=weights, **options)
    return gaussian_energy_score(samples, *targets, target_weights=weights, **options)


def run(inputs, dtype, backend, *, weights_too=True, **options):
    """Score and gradients of samples, targets and weights, which come last."""
    *points, weights = (value.detach().to(dtype) for value in inputs)
    leaves = [value.requires_grad_() for value in points]
    if weights_too:
        leaves.append(weights.requires_grad_())
    score = scored(points[0], points[1:], weights, backend=backend, **options)
    return differentiate(score, leaves)


kinds = pytest.mark.parametrize("kind", ["given", "mixture"])


@kinds
@dtypes
@sizes
def test_as_the_reference(n, m, width, dtype, kind, backend, generator):
    exponent = EXPONENTS[(n + m + width) % 3]
    samples = torch.randn(n, *ROWS, width, generator=generator, dtype=torch.float64)
    weights = make_weights(m, generator)
    inputs = [samples, *make_targets(kind, m, width, generator), weights]
    inputs = [value.to(dtype) for value in inputs[:-1]] + [weights.to(dtype)]
    weight = torch.tensor([[1.0, 2.0], [-5e-7, 1.0], [3.0, 0.0]])  # brings the huge ones back to 1
    options = {"exponent": exponent, "weight": weight}
    expected = run(inputs, torch.float64, "reference", **options)
    actual = run(inputs, dtype, backend, **options)
    assert [value.dtype for value in actual[1:]] == [dtype] * len(inputs)
    assert_as_reference(actual, expected, dtype)
    without = run(inputs, dtype, backend, weights_too=False, **options)
    for value, wanted in zip(without, actual[:-1], strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


@kinds
def test_gradcheck(kind, backend, generator):
    """Of signed weights and of one that is zero."""
    options = {"generator": generator, "dtype": torch.float64}
    inputs = [torch.randn(2, 2, 3, **options) for _ in range(2 + (kind == "mixture"))]
    inputs.append(torch.tensor([[0.7, -1.5], [0.0, 0.4]], dtype=torch.float64))
    leaves = [value.requires_grad_() for value in inputs]

    def score(samples, *targets):
        return scored(samples, targets[:-1], targets[-1], exponent=0.7, backend=backend)

    assert torch.autograd.gradcheck(score, leaves, eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("width", [8, 64])
def test_equal_weights_are_the_mean(width, backend, generator):
    """To a rounding of each term, 8 eps of the larger of them."""
    samples, targets = (torch.randn(n, 4, width, generator=generator) for n in (5, 6))
    plain = differentiate(
        energy_score(samples.requires_grad_(), targets.requires_grad_(), backend=backend),
        [samples, targets],
    )
    equal = torch.full((6, 4), 1 / 6)
    weighted = differentiate(
        energy_score(samples, targets, target_weights=equal, backend=backend), [samples, targets]
    )
    for value, wanted in zip(weighted, plain, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6 * 2 * width**0.5)


@pytest.mark.parametrize("width", [8, 64])
def test_one_gaussian_of_weight_one_is_the_plain_call(width, backend, generator):
    """Bit for bit, gradients and diagnostics included."""
    samples = torch.randn(3, 4, width, generator=generator).requires_grad_()
    mean, log_std = (torch.randn(4, width, generator=generator).requires_grad_() for _ in "ab")
    inputs, options = [samples, mean, log_std], {"return_diagnostics": True, "backend": backend}
    plain, terms = gaussian_energy_score(*inputs, **options)
    one, same = gaussian_energy_score(
        samples, mean[None], log_std[None], target_weights=torch.ones(1, 4), **options
    )
    actual, expected = differentiate(one, inputs), differentiate(plain, inputs)
    assert all(map(torch.equal, actual, expected))
    assert all(map(torch.equal, terms, same))


@kinds
def test_linear_in_the_target(kind, backend, generator):
    """The score of a weighted target is the weighted score of its parts where weights sum to 1."""
    samples = torch.randn(4, *ROWS, 8, generator=generator)
    targets = [value.float() for value in make_targets(kind, 3, 8, generator)]
    weights = torch.tensor([1.5, -0.75, 0.25])[:, None, None].expand(3, *ROWS)
    whole = scored(samples, targets, weights, backend=backend)
    one = torch.ones(1, *ROWS)
    parts = [
        scored(samples, [value[m : m + 1] for value in targets], one, backend=backend)
        for m in range(3)
    ]
    torch.testing.assert_close(whole, (weights * torch.stack(parts)).sum(0), rtol=1e-5, atol=1e-5)


@kinds
def test_no_positions(kind, backend, generator):
    samples = torch.randn(4, 8, generator=generator)
    targets = [value[:, 0, 0].float() for value in make_targets(kind, 3, 8, generator)]
    weights = torch.tensor([0.5, 0.25, 0.25])
    alone = scored(samples, targets, weights, backend=backend)
    row = scored(samples[:, None], [v[:, None] for v in targets], weights[:, None], backend=backend)
    assert alone.shape == () and torch.equal(alone, row[0])


@kinds
@pytest.mark.parametrize("width", [8, 64])
def test_ragged_targets(width, kind, backend, generator):
    """Padding of weight 0 may hold anything; the rest scores as it does alone."""
    samples = torch.randn(4, 3, width, generator=generator)
    options = {"generator": generator}
    targets = [torch.randn(5, 3, width, **options) for _ in range(1 + (kind == "mixture"))]
    counts = (5, 1, 2)
    weights = torch.zeros(5, 3)
    for row, count in enumerate(counts):
        weights[:count, row] = 1 / count
        for value in targets:
            value[count:, row] = float("nan")
    leaves = [value.requires_grad_() for value in (samples, *targets)]
    score, *gradients = differentiate(scored(samples, targets, weights, backend=backend), leaves)
    for row, count in enumerate(counts):
        alone = scored(
            samples[:, row], [v[:count, row] for v in targets], weights[:count, row],
            backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(score[row], alone, rtol=1e-6, atol=1e-5)
        assert gradients[0][:, row].isfinite().all()
        assert all(not gradient[count:, row].any() for gradient in gradients[1:])


@kinds
def test_a_masked_position_may_hold_anything(kind, backend, generator):
    samples = torch.randn(4, *ROWS, 8, generator=generator)
    targets = [value.float() for value in make_targets(kind, 3, 8, generator)]
    weights = make_weights(3, generator).float()
    weight = torch.ones(ROWS)
    weight[0, 1] = 0
    for value in (samples, *targets):
        value[:, 0, 1] = float("inf")
    weights[:, 0, 1] = float("nan")
    inputs = [samples, *targets, weights]
    for value in run(inputs, torch.float32, backend, weight=weight):
        assert value.isfinite().all()
    _, *gradients = run(inputs, torch.float32, backend, weight=weight)
    assert not any(gradient[:, 0, 1].any() for gradient in gradients)


@pytest.mark.parametrize("poisoned", ["samples", "targets", "weights"])
@pytest.mark.parametrize("width", [8, 64])
@kinds
def test_nan_shows(kind, width, poisoned, backend, generator):
    samples = torch.randn(4, *ROWS, width, generator=generator)
    targets = [value.float() for value in make_targets(kind, 3, width, generator)]
    weights = torch.full((3, *ROWS), 1 / 3)
    expected = scored(samples, targets, weights, backend=backend)
    {"samples": samples, "targets": targets[-1], "weights": weights}[poisoned][1, 0, 0] = torch.nan
    actual = scored(samples, targets, weights, backend=backend)
    assert actual[0, 0].isnan()
    torch.testing.assert_close(actual.flatten()[1:], expected.flatten()[1:])


def test_r2_of_a_mixture(backend):
    """The largest of the Gaussians with weight: 2 Σσ⁴ / (Σσ²)² at the mean."""
    zeros = torch.zeros(2, 3, 16)
    log_std = torch.full((3, 3, 16), -40.0)
    log_std[0] = 0.0  # r2 = 2 / 16
    log_std[1, :, :4] = 0.0  # 2 / 4
    log_std[2, :, :1] = 0.0  # 2
    weights = torch.tensor([[0.5, 0.0, 0.5], [0.5, 0.0, -0.5], [0.0, 1.0, 1.0]])
    _, terms = gaussian_energy_score(
        zeros, torch.zeros(3, 3, 16), log_std, target_weights=weights, return_diagnostics=True,
        backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(terms.max_r2, torch.tensor([2 / 4, 2.0, 2.0]))


@kinds
def test_in_blocks_of_rows(kind, generator, monkeypatch):
    samples = torch.randn(4, *ROWS, 64, generator=generator, dtype=torch.float64)
    inputs = [samples, *make_targets(kind, 3, 64, generator), make_weights(3, generator)]
    whole = run(inputs, torch.float32, "torch")
    monkeypatch.setattr(row_blocks, "CPU_WORKING_SET", 2 * 64 * 4)
    for value, wanted in zip(run(inputs, torch.float32, "torch"), whole, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


@kinds
def test_reads_nothing_on_the_host(kind):
    """Without data (meta tensors) anything that waits for a device's values fails."""
    points = [torch.zeros(3, *ROWS, 64, device="meta") for _ in range(2 + (kind == "mixture"))]
    inputs = [*points, torch.zeros(3, *ROWS, device="meta")]
    score, *gradients = run(inputs, torch.float32, "torch")
    assert score.shape == ROWS
    assert [value.shape for value in gradients] == [value.shape for value in inputs]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles(generator):
    """With graph breaks; the check of the sums stays outside."""
    samples, targets = (torch.randn(n, 4, 8, generator=generator).requires_grad_() for n in (3, 5))
    weights = torch.rand(5, 4, generator=generator).requires_grad_()

    def loss(*inputs):
        return -energy_score(*inputs[:2], target_weights=inputs[2], backend="torch").mean()

    inputs = (samples, targets, weights)
    expected = torch.autograd.grad(loss(*inputs), inputs)
    actual = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(*inputs), inputs)
    torch.testing.assert_close(actual, expected)


def expected_score(points, weights, share):
    """Matrix S of a finite alphabet: samples with probabilities q score qᵀSq on average.

    A position is a pair of letters, drawn independently; `share` is the exponent.
    """
    count = len(points)
    first, second = torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij")
    samples = torch.stack([points[first], points[second]])  # [2, K, K, L]
    targets = points[:, None, None].expand(count, count, count, -1)
    spread = weights[:, None, None].expand(count, count, count)
    return energy_score(samples, targets, target_weights=spread, exponent=share)


def stationary(matrix):
    """The q with Σq = 1 where qᵀSq is greatest; probabilities need not be positive."""
    count = len(matrix)
    symmetric = matrix + matrix.T
    system = torch.ones(count + 1, count + 1, dtype=matrix.dtype)
    system[:count, :count], system[-1, -1] = symmetric, 0
    right = torch.zeros(count + 1, dtype=matrix.dtype)
    right[-1] = 1
    return torch.linalg.solve(system, right)[:count]


class TestOptimum:
    """On a finite alphabet of points, where every expectation is a sum."""

    @pytest.fixture
    def points(self, generator):
        return torch.randn(6, 3, generator=generator, dtype=torch.float64)

    @pytest.fixture
    def tilted(self, generator):
        """p e^(r/β) / Z for an old distribution p and rewards r."""
        old = torch.rand(6, generator=generator, dtype=torch.float64)
        reward = torch.randn(6, generator=generator, dtype=torch.float64)
        return torch.softmax(old.log() + reward / 0.5, 0)

    @pytest.mark.parametrize("exponent", EXPONENTS)
    def test_is_the_tilted_distribution(self, exponent, points, tilted):
        """Total variation to it is rounding; every direction from there is downhill."""
        matrix = expected_score(points, tilted, exponent)
        best = stationary(matrix)
        assert (best - tilted).abs().sum() / 2 < 1e-9
        flat = torch.eye(6, dtype=torch.float64) - 1 / 6
        curvature = torch.linalg.eigvalsh(flat @ (matrix + matrix.T) @ flat)
        assert curvature[-2] < -1e-3 and abs(curvature[-1]) < 1e-9  # 0 along (1, ..., 1)

    def test_gradient_steps_find_it(self, points, tilted):
        matrix = expected_score(points, tilted, 1.0)
        logits = torch.zeros(6, dtype=torch.float64, requires_grad=True)
        adam = torch.optim.Adam([logits], lr=0.1)
        for _ in range(400):
            adam.zero_grad()
            share = torch.softmax(logits, 0)
            (-(share @ matrix @ share)).backward()
            adam.step()
        assert (torch.softmax(logits.detach(), 0) - tilted).abs().sum() / 2 < 1e-3

    def test_signed_weights_that_sum_to_one_have_the_nearest_distribution(self, points):
        """The best q is that of least energy distance 2E|q-w| - E|q-q'| - E|w-w'| to them."""
        signed = torch.tensor([0.6, 0.5, -0.3, 0.1, 0.3, -0.2], dtype=torch.float64)
        matrix = expected_score(points, signed, 1.0)
        distances = torch.cdist(points, points)
        shares = torch.distributions.Dirichlet(torch.ones(6, dtype=torch.float64)).sample((50,))
        score = torch.einsum("sj,jk,sk->s", shares, matrix, shares)
        gap = shares - signed
        energy = -torch.einsum("sj,jk,sk->s", gap, distances, gap)
        constant = float(signed @ distances @ signed)
        torch.testing.assert_close(score, -energy - constant, rtol=1e-9, atol=1e-9)
        assert (energy > 0).all()  # bounded: the score is at most -constant

    def test_weights_that_sum_to_less_have_no_optimum(self):
        """A share ε of samples far away gains 2ε(1 - ε - s) for each unit of distance."""
        place = torch.zeros(1, 1, dtype=torch.float64)
        for total, gains in ((0.5, True), (1.0, False)):
            scores = []
            for far in (0.0, 10.0, 1000.0):
                points = torch.cat([place, place + far])
                weights = torch.tensor([total, 0.0], dtype=torch.float64)
                share = torch.tensor([0.9, 0.1], dtype=torch.float64)
                scores.append(float(share @ expected_score(points, weights, 1.0) @ share))
            assert (scores[0] < scores[1] < scores[2]) == gains
            assert (scores[0] > scores[1] > scores[2]) != gains

    def test_weights_that_sum_to_more_make_it_narrower(self):
        """Two letters, target (a, b) and Σw = s: the best share is 1/2 + s (a/s - 1/2)."""
        points = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        weights = torch.tensor([0.9, 0.6], dtype=torch.float64)  # 0.6 and 0.4, times 1.5
        best = stationary(expected_score(points, weights, 1.0))
        assert best.tolist() == pytest.approx([0.5 + 0.9 - 0.75, 0.5 + 0.6 - 0.75])
        assert best[0] > 0.6


SAMPLES = torch.zeros(3, 2, 5, 4)
TARGETS, WEIGHTS = torch.zeros(7, 2, 5, 4), torch.full((7, 2, 5), 1 / 7)
ZERO = WEIGHTS.clone()
ZERO[:, 1, 2] = torch.tensor([0.1, 0.2, -0.3, 0.0, 0.0, 0.5, -0.5])
BAD = [
    ([1.0], TypeError, r"target_weights must be a tensor, got list"),
    (WEIGHTS.long(), TypeError, r"target_weights must have dtype .*int64"),
    (WEIGHTS[0], ValueError, r"target_weights must have shape \(.*2, 5\).*got \(2, 5\)"),
    (WEIGHTS[..., None], ValueError, r"target_weights must have shape \(7, 2, 5\)"),
    (WEIGHTS.to("meta"), ValueError, r"target_weights must be on the device of samples"),
    (WEIGHTS * 0, ValueError, r"target_weights must not sum to zero .* 10 of 10 positions"),
    (ZERO, ValueError, r"target_weights must not sum to zero .* 1 of 10 positions"),
]


@pytest.mark.parametrize(("weights", "error", "message"), BAD)
def test_bad_weights(weights, error, message):
    with pytest.raises(error, match=message):
        energy_score(SAMPLES, TARGETS, target_weights=weights)
    with pytest.raises(error, match=message):
        gaussian_energy_score(SAMPLES, TARGETS, TARGETS, target_weights=weights)


def test_bad_mixtures():
    with pytest.raises(ValueError, match=r"target_weights must have shape \(7, 2, 5\).*\(6, 2, 5"):
        energy_score(SAMPLES, TARGETS, target_weights=WEIGHTS[:6])
    with pytest.raises(ValueError, match=r"mean must have shape \(6, 2, 5, 4\) \(a Gaussian for"):
        gaussian_energy_score(SAMPLES, TARGETS, TARGETS, target_weights=WEIGHTS[:6])
    with pytest.raises(ValueError, match=r"target_weights must hold at least 1 target, got 0"):
        gaussian_energy_score(SAMPLES, TARGETS, TARGETS, target_weights=WEIGHTS[:0])
    with pytest.raises(ValueError, match=r"mean must have shape \(2, 5, 4\)"):
        gaussian_energy_score(SAMPLES, TARGETS, TARGETS)
    for options, given in (
        ({"targets": "sample"}, "targets='sample'"),
        ({"target_noise": TARGETS}, "target_noise"),
    ):
        with pytest.raises(ValueError, match=f'must come with targets="analytic", got {given}'):
            gaussian_energy_score(SAMPLES, TARGETS, TARGETS, target_weights=WEIGHTS, **options)


def test_a_masked_position_may_have_weights_that_sum_to_zero():
    weight = torch.ones(2, 5)
    weight[1, 2] = 0
    score = energy_score(SAMPLES, TARGETS, target_weights=ZERO, weight=weight)
    assert (score == 0).all()
