"""The energy score's kernels against the float64 reference: every mode, every gradient."""

import pytest
import torch
import triton
import triton.language as tl
from energy_cases import (
    EXPONENTS,
    Case,
    assert_as_reference,
    assert_nan_shows,
    differentiate,
    make_case,
    score_and_gradients,
)
from helpers import sparse_memory

from calm_kernels import energy_score, gaussian_energy_score
from calm_kernels.energy_score import analytic_kernels, direct_kernels, gram_kernels
from calm_kernels.tuning import TABLE, Launch

MODES = ["analytic", "antithetic", "sample"]
# One dimension, few, beyond a power of two, and both sides of the switch to products (64).
WIDTHS = [1, 8, 33, 64, 100]
# Score, gradients: see TOLERANCES. Kernels add tile by tile, not in pairs: 2.5 times the roundings
# of a score. The interpreter truncates to bf16, by up to 2^-7 = 7.8e-3, on average by half of it.
FP32, BF16 = (5e-6, 2e-5), (5e-6, 6e-3)


def compare(case, dtype=torch.float32, tolerances=FP32, **options):
    """Score and gradients of the kernel and of the reference, which must agree."""
    case = case.to(dtype)
    expected = score_and_gradients(case.to(torch.float64, True), "reference", **options)
    actual = score_and_gradients(case.to(dtype, True), "triton", **options)
    assert actual[0].dtype == torch.float32
    assert [value.dtype for value in actual[1:]] == [dtype] * 3
    assert_as_reference(actual, expected, dtype, tolerances)


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", WIDTHS)
def test_modes(width, mode, exponent, generator):
    case = make_case(3, (2,), width, generator)
    compare(case, exponent=exponent, targets=mode, num_targets=18, seed=7, first_row=5)


def test_matmuls_of_more_dimensions(monkeypatch, generator):
    """Where the table has a row for them; direct differences give the same."""
    case = make_case(3, (2,), 300, generator).to(torch.bfloat16)
    options = {"targets": "sample", "num_targets": 18, "seed": 7, "backend": "triton"}
    direct = gaussian_energy_score(*case, **options)
    monkeypatch.setitem(TABLE, ("energy_score.gram.wide", "default"), {512: Launch()})
    monkeypatch.setattr(direct_kernels, "direct_kernel", None)
    compare(case, torch.bfloat16, BF16, targets="sample", num_targets=18, seed=7)
    by_matmuls = gaussian_energy_score(*case, **options)
    torch.testing.assert_close(by_matmuls, direct, rtol=1e-5, atol=0)


@pytest.mark.parametrize("num_samples", [2, 8, 11])
@pytest.mark.parametrize("mode", MODES)
def test_numbers_of_samples(num_samples, mode, generator):
    """Fewer than a block, a block, and more than one."""
    case = make_case(num_samples, (2,), 64, generator)
    compare(case, targets=mode, num_targets=20, seed=1)


@pytest.mark.parametrize("std", [(0.3, 0.3), (0.001, 1.0)], ids=["even", "uneven"])
@pytest.mark.parametrize("exponent", [0.1, 1.9])
@pytest.mark.parametrize("width", [2, 64])
def test_both_sides_of_the_guard(width, exponent, std, generator):
    case = make_case(2, (2,), width, generator, std=std, reach=1.0)
    compare(case, exponent=exponent, tolerances=(2e-5, 2e-5))


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16(mode, generator):
    case = make_case(3, (2,), 64, generator)
    compare(case, torch.bfloat16, BF16, targets=mode, num_targets=6, seed=1)


def test_float16_samples_and_a_float32_target(generator):
    case = make_case(3, (2,), 16, generator)
    inputs = [case.samples.half(), case.mean.float(), case.log_std.float()]
    mixed = [value.detach().requires_grad_() for value in inputs]
    actual = differentiate(gaussian_energy_score(*mixed, backend="triton"), mixed)
    wide = [value.double().requires_grad_() for value in inputs]
    expected = differentiate(gaussian_energy_score(*wide, backend="reference"), wide)
    # The interpreter truncates to float16, by up to 9.8e-4; twice that.
    assert_as_reference(actual, expected, torch.float16, (5e-6, 2e-3))


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("width", [8, 64])
@pytest.mark.parametrize("mode", MODES)
def test_coincident_points(mode, width, exponent, generator):
    """All samples equal, two samples equal, a sample on the mean, a target without spread."""
    case = make_case(4, (4,), width, generator)
    case.samples[:, 0] = case.samples[:1, 0]
    case.samples[1, 1] = case.samples[0, 1]
    case.samples[2, 2] = case.mean[2]
    case.log_std[3] = -float("inf")
    case.samples[:, 3] = case.mean[3]
    case = case.to(torch.float32)
    options = {"exponent": exponent, "targets": mode, "num_targets": 4, "seed": 3}
    score, *gradients = score_and_gradients(case.to(torch.float32, True), "triton", **options)
    assert torch.isfinite(score).all() and score[3] == 0
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert not gradients[0][:, 3].any()
    expected = score_and_gradients(case.to(torch.float32, True), "torch", **options)
    torch.testing.assert_close(score, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[0], expected[1], rtol=1e-4, atol=1e-5)


@triton.jit
def operand_kernel(x_ptr, out_ptr, PRECISION: tl.constexpr):
    offsets = tl.arange(0, 64)
    operand = gram_kernels._operand(tl.load(x_ptr + offsets), tl.float32, PRECISION)
    tl.store(out_ptr + offsets, operand)


def test_operands_are_rounded_to_nearest(generator):
    """To the 10 bits of tf32, which cuts them off; in float32 products to none."""
    x = torch.randn(64, generator=generator)
    rounded, kept = torch.empty_like(x), torch.empty_like(x)
    operand_kernel[(1,)](x, rounded, "tf32")
    operand_kernel[(1,)](x, kept, "ieee")
    mantissa, exponent = torch.frexp(x)
    expected = torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)
    assert torch.equal(rounded, expected) and torch.equal(kept, x)


def test_a_rounded_operand_keeps_nan():
    """A GPU's own NaN has all bits set, and rounding adds to them."""
    bits = torch.full((64,), 0x7FFFFFFF, dtype=torch.int32)
    bits[1::2] = -1
    x = bits.view(torch.float32)
    rounded = torch.empty_like(x)
    operand_kernel[(1,)](x, rounded, "tf32")
    assert rounded.isnan().all()


def test_coincident_samples_do_not_move_one_another(generator):
    """A head that starts at zero draws N equal samples: the pair term and its gradient are 0."""
    point = torch.randn(1, 2, 64, generator=generator)
    samples = point.expand(8, 2, 64).clone().requires_grad_()
    targets = point.detach().clone()
    score = energy_score(samples, targets, exponent=0.5, backend="triton")
    (gradient,) = torch.autograd.grad(score.sum(), samples)
    assert not score.any() and not gradient.any()


@pytest.mark.parametrize(("n", "m", "width"), [(2, 1, 1), (3, 5, 20), (11, 3, 12), (8, 4, 130)])
@pytest.mark.parametrize("exponent", EXPONENTS)
def test_given_targets(n, m, width, exponent, generator):
    points = [torch.randn(count, 2, width, generator=generator) for count in (n, m)]

    def run(dtype, backend):
        inputs = [value.to(dtype).requires_grad_() for value in points]
        return differentiate(energy_score(*inputs, exponent=exponent, backend=backend), inputs)

    actual, expected = run(torch.float32, "triton"), run(torch.float64, "reference")
    assert_as_reference(actual, expected, torch.float32, FP32)


@pytest.mark.parametrize("width", [12, 64])
def test_given_noise(width, generator):
    noise = torch.randn(5, 2, width, generator=generator)
    compare(make_case(3, (2,), width, generator), target_noise=noise)


@pytest.mark.parametrize("mode", MODES)
def test_masked_patches_may_hold_anything(mode, generator):
    case = make_case(3, (3,), 64, generator).to(torch.float32, True)
    weight = torch.tensor([0.0, 2.0, 0.5])
    options = {"targets": mode, "num_targets": 4, "seed": 2, "backend": "triton"}
    alone = differentiate(gaussian_energy_score(*case, **options), case)
    with torch.no_grad():
        for value in case:
            value[..., 0, :] = float("nan")
    score, *gradients = differentiate(gaussian_energy_score(*case, weight=weight, **options), case)
    assert score[0] == 0 and not any(gradient[..., 0, :].any() for gradient in gradients)
    torch.testing.assert_close(score[1:], weight[1:] * alone[0][1:])
    for actual, expected in zip(gradients, alone[1:], strict=True):
        scaled = weight[1:, None] * expected[..., 1:, :]
        # A product with the weight more, at another place: a few eps, and of what cancels to zero.
        torch.testing.assert_close(actual[..., 1:, :], scaled, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", MODES)
def test_a_patch_with_a_bad_input_keeps_it_to_itself(mode, bad, generator):
    case = make_case(3, (2,), 64, generator).to(torch.float32)
    options = {"targets": mode, "num_targets": 4, "seed": 2, "backend": "triton"}
    expected = gaussian_energy_score(*case, **options)
    case.log_std[0, 3] = bad
    actual = gaussian_energy_score(*case, **options)
    assert not actual[0].isfinite() and actual[1] == expected[1]


@pytest.mark.filterwarnings("ignore:(invalid value|overflow|All-NaN):RuntimeWarning")
@pytest.mark.parametrize("poisoned", ["samples", "mean", "log_std", "weight"])
@pytest.mark.parametrize(("mode", "width"), [("analytic", 4), ("sample", 4), ("antithetic", 64)])
def test_nan_shows(mode, width, poisoned, generator):
    case = make_case(2, (2,), width, generator)
    assert_nan_shows(case, poisoned, "triton", targets=mode, weight=torch.tensor([2.0, 0.5]))


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
def test_nan_in_given_noise_and_targets_shows(generator):
    noise = torch.randn(4, 2, 8, generator=generator)
    assert_nan_shows(make_case(3, (2,), 8, generator), "noise", "triton", target_noise=noise)
    noise[1, 0, 2] = float("nan")
    score = energy_score(torch.zeros(3, 2, 8), noise, backend="triton")
    assert score[0].isnan() and score[1].isfinite()


def test_diagnostics(generator):
    case = make_case(3, (4,), 64, generator).to(torch.float32, True)
    options = {"weight": torch.tensor([1.0, 0.0, 2.0, 0.5]), "return_diagnostics": True}
    score, terms = gaussian_energy_score(*case, backend="triton", **options)
    _, expected = gaussian_energy_score(*case, backend="torch", **options)
    torch.testing.assert_close(score, terms.diversity - terms.fidelity)
    for actual, wanted in zip(terms, expected, strict=True):
        assert not actual.requires_grad
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)
    assert (terms.max_r2 > 0).tolist() == [True, False, True, True]


def test_any_strides(generator):
    case = make_case(3, (2, 2), 16, generator).to(torch.float32)
    expected = score_and_gradients(case.to(torch.float32, True), "triton")
    views = [
        case.samples.movedim(0, 2).contiguous().movedim(2, 0),
        case.samples.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        torch.stack([case.samples, -case.samples], dim=-1)[..., 0],
    ]
    for samples in views:
        mean, log_std = (torch.stack([v, v], -1)[..., 0] for v in (case.mean, case.log_std))
        inputs = Case(*(value.detach().requires_grad_() for value in (samples, mean, log_std)))
        actual = score_and_gradients(inputs, "triton")
        for value, wanted in zip(actual, expected, strict=True):
            assert torch.equal(value, wanted)


def far_apart(tensor, far=2**31):
    """The same numbers with 2^31 elements from one index of the first axis to the next, so that
    offsets do not fit into 32 bits.
    """
    memory = sparse_memory((len(tensor) - 1) * far + tensor[0].numel(), tensor.dtype)
    spread = memory.as_strided(tensor.shape, (far, *tensor.contiguous().stride()[1:]))
    return spread.copy_(tensor)


@pytest.mark.parametrize("width", [8, 64])
@pytest.mark.parametrize("mode", MODES)
def test_offsets_beyond_32_bits(mode, width, generator):
    case = make_case(2, (2,), width, generator).to(torch.bfloat16)
    options = {"targets": mode, "num_targets": 4, "seed": 2, "backend": "triton"}
    expected = gaussian_energy_score(*case, **options)
    actual = gaussian_energy_score(*map(far_apart, case), **options)  # samples, mean, log_std
    assert torch.equal(actual, expected)
    by_row = far_apart(case.samples.transpose(0, 1)).transpose(0, 1)
    assert torch.equal(gaussian_energy_score(by_row, *case[1:], **options), expected)
    noise = torch.randn(2, 2, width, generator=generator).bfloat16()
    given = [
        gaussian_energy_score(*case, target_noise=draws, backend="triton")
        for draws in (noise, far_apart(noise))
    ]
    assert torch.equal(*given)


@pytest.mark.parametrize("mode", ["antithetic", "sample"])
@pytest.mark.parametrize("width", [8, 64])
def test_any_split_of_a_batch_draws_the_same(width, mode, generator):
    case = make_case(3, (3,), width, generator).to(torch.float32)
    options = {"targets": mode, "num_targets": 4, "seed": 9, "backend": "triton"}
    whole = gaussian_energy_score(*case, **options)
    parts = [
        gaussian_energy_score(
            case.samples[:, rows], case.mean[rows], case.log_std[rows], first_row=rows.start,
            **options,
        )
        for rows in (slice(0, 1), slice(1, 3))
    ]  # fmt: skip
    assert torch.equal(torch.cat(parts), whole)
    first = torch.tensor(0)
    assert torch.equal(gaussian_energy_score(*case, first_row=first, **options), whole)


def test_a_seed_a_patch(generator):
    case = make_case(3, (3,), 64, generator).to(torch.float32)
    options = {"targets": "sample", "num_targets": 4, "seed": torch.tensor([4, 5, 6])}
    actual = gaussian_energy_score(*case, backend="triton", **options)
    expected = gaussian_energy_score(*case, backend="torch", **options)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_empty_batch_launches_nothing(monkeypatch):
    monkeypatch.setattr(analytic_kernels, "analytic_kernel", None)
    monkeypatch.setattr(gram_kernels, "gram_kernel", None)
    monkeypatch.setattr(direct_kernels, "direct_kernel", None)
    samples = torch.zeros(3, 0, 64, requires_grad=True)
    target = torch.zeros(0, 64)
    for mode in MODES:
        score = gaussian_energy_score(samples, target, target, targets=mode, backend="triton")
        assert score.shape == (0,)
        assert torch.autograd.grad(score.sum(), samples)[0].shape == samples.shape
    assert energy_score(samples, torch.zeros(2, 0, 64), backend="triton").shape == (0,)


def test_an_expanded_upstream_gradient(generator):
    case = make_case(3, (4,), 8, generator).to(torch.float32, True)
    by_mean = torch.autograd.grad(gaussian_energy_score(*case, backend="triton").mean(), case)
    upstream = torch.full((4, 2), 0.25)[:, 0]  # not contiguous
    score = gaussian_energy_score(*case, backend="triton")
    for actual, expected in zip(torch.autograd.grad(score, case, upstream), by_mean, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([torch.zeros(2, 3, 1025)] + [torch.zeros(3, 1025)] * 2, r"latent sizes up to 1024.*1025"),
        ([torch.zeros(2, 3, 4).double()] + [torch.zeros(3, 4)] * 2, r"no float64"),
        ([torch.zeros(2, 3, 4), torch.zeros(3, 4).double(), torch.zeros(3, 4)], r"no float64"),
    ],
)
def test_what_the_kernels_refuse(inputs, message):
    with pytest.raises(ValueError, match=message):
        gaussian_energy_score(*inputs, backend="triton")
