"""What an energy score must satisfy whatever the numbers, and what a call must not do."""

import pytest
import torch
from energy_cases import EXPONENTS, Case, assert_nan_shows, make_case, score_and_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from calm_kernels.energy_score import energy_score, gaussian_energy_score, row_blocks

# 1e-5: other numbers that are equal on paper, as by TOLERANCES, with scores of about 1. Where 1e-6
# stands: the same numbers, whose sums vector units may split otherwise, 8 eps.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
targets_kinds = pytest.mark.parametrize("targets", ["analytic", "antithetic", "sample"])


def scored(case, backend, **options):
    return gaussian_energy_score(*case, backend=backend, num_targets=6, seed=3, **options)


@targets_kinds
@pytest.mark.parametrize("width", [8, 64])
class TestInvariance:
    def test_translation(self, width, targets, backend, generator):
        case = make_case(4, (5,), width, generator).to(torch.float32)
        shift = 3 * torch.randn(5, width, generator=generator)
        moved = Case(case.samples + shift, case.mean + shift, case.log_std)
        options = {"backend": backend, "targets": targets}
        torch.testing.assert_close(scored(moved, **options), scored(case, **options), **CLOSE)

    def test_order_of_samples(self, width, targets, backend, generator):
        case = make_case(5, (4,), width, generator).to(torch.float32)
        options = {"backend": backend, "targets": targets}
        expected = score_and_gradients(case.to(torch.float32, True), seed=3, **options)
        order = torch.randperm(5, generator=generator)
        permuted = Case(case.samples[order], case.mean, case.log_std)
        actual = score_and_gradients(permuted.to(torch.float32, True), seed=3, **options)
        torch.testing.assert_close(actual[0], expected[0], **CLOSE)
        torch.testing.assert_close(actual[1], expected[1][order], **CLOSE)

    def test_slot_of_a_patch(self, width, targets, backend, generator):
        """A patch scores the same wherever it stands and whatever stands beside it."""
        case = make_case(4, (9,), width, generator).to(torch.float32)
        case.log_std[::2] = -3.0  # half of the patches narrow: both methods at work
        noise = torch.randn(6, 9, width, generator=generator)
        options = {"backend": backend, "targets": targets}
        if targets != "analytic":
            options["target_noise"] = noise
        expected = gaussian_energy_score(*case, **options)
        for row in (0, 5, 8):
            one = slice(row, row + 1)
            if targets != "analytic":
                options["target_noise"] = noise[:, one]
            alone = gaussian_energy_score(
                case.samples[:, one], case.mean[one], case.log_std[one], **options
            )
            torch.testing.assert_close(alone, expected[one], rtol=1e-6, atol=1e-6)

    def test_mirror(self, width, targets, backend, generator):
        """Reflecting everything changes nothing."""
        case = make_case(3, (4,), width, generator).to(torch.float32)
        noise = torch.randn(4, 4, width, generator=generator)
        mirrored = Case(-case.samples, -case.mean, case.log_std)
        kind = {"targets": targets} if targets == "analytic" else {}
        options = [
            kind or {"target_noise": sign * noise, "targets": targets} for sign in (1.0, -1.0)
        ]
        torch.testing.assert_close(
            gaussian_energy_score(*case, backend=backend, **options[0]),
            gaussian_energy_score(*mirrored, backend=backend, **options[1]),
            **CLOSE,
        )


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("width", [8, 64])
def test_the_target_itself_scores_best(width, exponent, generator):
    """Strictly proper: samples of the target score above shifted, shrunk and spread ones."""
    case = make_case(400, (4,), width, generator, std=(0.2, 0.5)).to(torch.float32)
    spread = case.samples - case.mean
    others = (case.samples + 0.3, case.mean + 0.7 * spread, case.mean + 1.3 * spread)
    best = gaussian_energy_score(*case, exponent=exponent)
    for samples in others:
        worse = gaussian_energy_score(samples, case.mean, case.log_std, exponent=exponent)
        assert (best > worse).all()


class TestSeeds:
    def test_same_seed_same_bits(self, backend, generator):
        case = make_case(3, (4, 2), 8, generator).to(torch.float32)
        options = {"targets": "sample", "backend": backend}
        first = gaussian_energy_score(*case, seed=5, **options)
        assert torch.equal(first, gaussian_energy_score(*case, seed=5, **options))
        assert not torch.equal(first, gaussian_energy_score(*case, seed=6, **options))
        offset = torch.tensor([5, 1])
        assert not torch.equal(first, gaussian_energy_score(*case, seed=offset, **options))

    def test_backends_draw_the_same(self, generator):
        case = make_case(3, (4, 2), 8, generator).to(torch.float32)
        scores = [scored(case, name, targets="sample") for name in ("reference", "torch")]
        torch.testing.assert_close(*scores, **CLOSE)

    def test_without_a_seed_torch_seeds_it(self, backend, generator):
        case = make_case(3, (4,), 8, generator).to(torch.float32)

        def draw():
            torch.manual_seed(11)
            return gaussian_energy_score(*case, targets="sample", backend=backend)

        assert torch.equal(draw(), draw())

    @pytest.mark.parametrize("targets", ["antithetic", "sample"])
    def test_a_split_batch_draws_the_same(self, targets, backend, generator):
        case = make_case(3, (7,), 8, generator).to(torch.float32)
        options = {"targets": targets, "num_targets": 4, "seed": 9, "backend": backend}
        whole = gaussian_energy_score(*case, **options)
        for cut in (1, 4):
            parts = [
                gaussian_energy_score(
                    case.samples[:, rows],
                    case.mean[rows],
                    case.log_std[rows],
                    first_row=first_row,
                    **options,
                )
                for rows, first_row in (
                    (slice(0, cut), 0),
                    (slice(cut, 7), torch.tensor(cut)),
                )
            ]
            torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)

    def test_a_seed_a_patch(self, backend, generator):
        """With its own seed a patch draws the same alone and in a batch."""
        case = make_case(3, (5,), 8, generator).to(torch.float32)
        seeds = torch.tensor([[1, 0], [2, 0], [3, 0], [1, 0], [1, 7]])
        options = {"targets": "sample", "num_targets": 4, "backend": backend}
        case = Case(
            case.samples[:, :1].expand_as(case.samples), *(v[:1].expand(5, 8) for v in case[1:])
        )
        score = gaussian_energy_score(*case, seed=seeds, **options)
        alone = gaussian_energy_score(
            case.samples[:, :1], case.mean[:1], case.log_std[:1], seed=2, **options
        )
        assert score[0] == score[3]
        assert len(set(score.tolist())) == 4
        torch.testing.assert_close(score[1:2], alone, rtol=1e-6, atol=1e-6)

    def test_row_blocks_draw_what_the_whole_draws(self, generator, monkeypatch):
        case = make_case(3, (11,), 8, generator).to(torch.float32)
        whole = scored(case, "torch", targets="sample")
        monkeypatch.setattr(row_blocks, "CPU_WORKING_SET", 3 * 8 * 6)
        torch.testing.assert_close(
            scored(case, "torch", targets="sample"), whole, rtol=1e-6, atol=1e-6
        )


@targets_kinds
class TestWeight:
    def test_multiplies_score_and_gradients(self, targets, backend, generator):
        case = make_case(3, (2, 3), 40, generator).to(torch.float32)
        weight = torch.rand(2, 3, generator=generator)
        options = {"targets": targets, "seed": 0}
        plain = score_and_gradients(case.to(torch.float32, True), backend, **options)
        actual = score_and_gradients(
            case.to(torch.float32, True), backend, weight=weight, **options
        )
        torch.testing.assert_close(actual[0], plain[0] * weight, **CLOSE)
        torch.testing.assert_close(actual[1], plain[1] * weight[..., None], **CLOSE)
        for value, truth in zip(actual[2:], plain[2:], strict=True):
            torch.testing.assert_close(value, truth * weight[..., None], **CLOSE)

    @pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")], ids=str)
    def test_a_masked_patch_may_hold_anything(self, poison, targets, backend, generator):
        case = make_case(3, (4,), 40, generator).to(torch.float32)
        weight = torch.tensor([1.0, 0.0, 2.0, 0.0])
        options = {"targets": targets, "seed": 0, "weight": weight, "backend": backend}
        expected = score_and_gradients(case.to(torch.float32, True), **options)
        masked = weight == 0
        for value in (case.samples[:, masked], case.mean[masked], case.log_std[masked]):
            value.fill_(poison)
        case.samples[:, masked] = poison
        case.mean[masked] = poison
        case.log_std[masked] = poison
        actual = score_and_gradients(case.to(torch.float32, True), **options)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
        assert (actual[0][masked] == 0).all()
        assert (actual[1][:, masked] == 0).all()
        assert all((gradient[masked] == 0).all() for gradient in actual[2:])

    def test_given_noise_of_a_masked_patch(self, targets, backend, generator):
        case = make_case(3, (4,), 8, generator).to(torch.float32)
        weight = torch.tensor([1.0, 0.0, 2.0, 0.0])
        noise = torch.randn(5, 4, 8, generator=generator)
        noise[:, weight == 0] = float("nan")
        options = {"targets": targets, "target_noise": noise, "weight": weight}
        outputs = score_and_gradients(case.to(torch.float32, True), backend, **options)
        assert all(torch.isfinite(value).all() for value in outputs)


@pytest.mark.parametrize("poisoned", ["samples", "mean", "log_std", "weight"])
@pytest.mark.parametrize("width", [5, 64])
@targets_kinds
def test_nan_shows(targets, width, poisoned, backend, generator):
    case = make_case(3, (2,), width, generator)
    assert_nan_shows(case, poisoned, backend, targets=targets, weight=torch.tensor([2.0, 0.5]))


@pytest.mark.parametrize("width", [5, 64])
def test_nan_in_given_noise_shows(width, backend, generator):
    noise = torch.randn(4, 2, width, generator=generator)
    case = make_case(3, (2,), width, generator)
    assert_nan_shows(case, "noise", backend, target_noise=noise)


def test_nan_in_given_targets_shows(backend, generator):
    samples, targets = (torch.randn(n, 3, 8, generator=generator) for n in (4, 2))
    expected = energy_score(samples, targets, backend=backend)
    targets[:, 0] = float("nan")
    samples[1, 1, 2] = float("nan")
    actual = energy_score(samples, targets, backend=backend)
    assert actual[:2].isnan().all() and torch.equal(actual[2], expected[2])


def test_weight_of_given_targets(backend, generator):
    samples, targets = (torch.randn(n, 3, 8, generator=generator) for n in (4, 2))
    plain = energy_score(samples, targets, backend=backend)
    samples[:, 1], targets[:, 1] = float("nan"), float("inf")
    weight = torch.tensor([2.0, 0.0, 0.5])
    actual = energy_score(samples, targets, weight=weight, backend=backend)
    torch.testing.assert_close(actual, plain * weight, **CLOSE)


class TestDiagnostics:
    @targets_kinds
    def test_terms(self, targets, backend, generator):
        case = make_case(4, (2, 3), 40, generator).to(torch.float32, True)
        options = {"targets": targets, "return_diagnostics": True}
        weight = torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 1.0]])
        score, terms = scored(case, backend, weight=weight, **options)
        torch.testing.assert_close(terms.diversity - terms.fidelity, score.detach(), **CLOSE)
        assert score.requires_grad
        assert not terms.fidelity.requires_grad
        assert not terms.diversity.requires_grad
        assert (terms.max_r2 is None) == (targets != "analytic")
        assert torch.equal(score, scored(case, backend, weight=weight, targets=targets))

    def test_r2(self, backend, generator):
        """At the mean, r2 = 2 Σσ⁴ / (Σσ²)²: 2 / L for equal variances."""
        case = make_case(2, (3,), 16, generator, std=(0.3, 0.3), reach=0.0).to(torch.float32)
        _, terms = scored(case, backend, return_diagnostics=True)
        torch.testing.assert_close(terms.max_r2, torch.full((3,), 2 / 16))

    @pytest.mark.parametrize("backend", ["reference", "torch"])
    def test_r2_of_a_masked_patch(self, backend):
        """0, as every other term; the kernels say the same."""
        zeros = torch.zeros(3, 4, 16)
        weight = torch.tensor([1.0, 0.0, -2.0, 0.5])
        _, terms = gaussian_energy_score(
            zeros, zeros[0], zeros[0], weight=weight, return_diagnostics=True, backend=backend
        )
        assert terms.max_r2.tolist() == [2 / 16, 0.0, 2 / 16, 2 / 16]


@pytest.mark.parametrize(("width", "std"), [(6, 0.4), (64, 0.3), (64, 1e-3)])
@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("targets", ["antithetic", "sample"])
def test_analytic_is_the_mean_of_draws(targets, exponent, width, std, generator):
    case = make_case(3, (6,), width, generator, std=(std, 0.5)).to(torch.float64)
    exact = gaussian_energy_score(*case, exponent=exponent)
    options = {"targets": targets, "num_targets": 20, "exponent": exponent}
    drawn = torch.stack([gaussian_energy_score(*case, seed=s, **options) for s in range(100)])
    standard_error = drawn.std(0) / 100**0.5
    assert ((drawn.mean(0) - exact).abs() < 4 * standard_error).all()
    assert (standard_error > 0).all()


def test_antithetic_draws_have_less_noise(generator):
    case = make_case(8, (6,), 64, generator).to(torch.float32, True)

    def spread(targets):
        gradients = [
            torch.autograd.grad(
                gaussian_energy_score(*case, targets=targets, num_targets=10, seed=seed).sum(),
                case.samples,
            )[0]
            for seed in range(20)
        ]
        return torch.stack(gradients).std(0).mean()

    assert spread("antithetic") < 0.3 * spread("sample")


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that anything in the block makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor) and value.untyped_storage().size():
                size = value.untyped_storage().nbytes() // value.element_size()
                self.elements = max(self.elements, size)
        return result


@targets_kinds
def test_no_array_of_all_distances(targets, generator):
    """Neither [N, M, R, L] nor all draws [M, R, L] at once."""
    n, m, rows, width = 8, 100, 300, 64
    case = make_case(n, (rows,), width, generator).to(torch.float32, True)
    with LargestTensor() as largest:
        score = gaussian_energy_score(*case, targets=targets, num_targets=m, seed=0)
        score.sum().backward()
    assert largest.elements <= 2 * row_blocks.CPU_WORKING_SET
    assert 2 * row_blocks.CPU_WORKING_SET < m * rows * width < n * m * rows * width


@pytest.mark.parametrize("width", [8, 64])
@targets_kinds
def test_reads_nothing_on_the_host(targets, width):
    """Without data (meta tensors) anything that waits for a device's values fails."""
    case = Case(
        torch.zeros(3, 4, width, device="meta"), *torch.zeros(2, 4, width, device="meta")
    ).to(torch.float32, True)
    weight = torch.ones(4, device="meta")
    options = {"targets": targets, "num_targets": 4, "weight": weight, "seed": 0}
    score, *gradients = score_and_gradients(case, "torch", **options)
    assert score.shape == (4,)
    assert gradients[0].shape == (3, 4, width)


def test_autocast_leaves_it_alone(backend, generator):
    case = make_case(4, (3,), 64, generator).to(torch.float32, True)
    expected = score_and_gradients(case, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = score_and_gradients(case, backend)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles(generator):
    """With graph breaks; the warnings are Dynamo's own."""
    case = make_case(3, (4,), 40, generator).to(torch.float32, True)

    def loss(*inputs):
        return -gaussian_energy_score(*inputs, backend="torch").mean()

    expected = torch.autograd.grad(loss(*case), case)
    actual = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(*case), case)
    torch.testing.assert_close(actual, expected)
