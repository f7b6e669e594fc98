"""The energy score at 8192 positions, N = 8 samples, M = 100 targets, G = 4 Gaussians, L = 128."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from calm_kernels.compiling.configuration import Configuration
from calm_kernels.compiling.inspection import Fixed
from calm_kernels.compiling.targets import Target
from calm_kernels.energy_score.analytic_kernels import analytic_constants, analytic_kernel
from calm_kernels.energy_score.direct_kernels import direct_constants, direct_kernel
from calm_kernels.energy_score.gram_kernels import gram_constants, gram_kernel
from calm_kernels.energy_score.nodes import nodes
from calm_kernels.energy_score.problem import Problem

__all__ = ["cases"]

NUM_SAMPLES, NUM_TARGETS, NUM_GAUSSIANS, WIDTH = 8, 100, 4, 128
_FLOAT32 = (
    "weight_ptr", "target_weights_ptr", "score_ptr", "terms_ptr", "dmean_ptr", "dlog_std_ptr",
    "dtargets_ptr", "dtarget_weights_ptr",
)  # fmt: skip
_TYPES = (
    dict.fromkeys(_FLOAT32, "*fp32")
    | dict.fromkeys(("seed_ptr", "first_row_ptr"), "*i64")
    | dict.fromkeys(("first", "step", "log_scale"), "fp32")
)
_ONES = (
    "stride_l", "stride_mean_l", "stride_std_l", "stride_target_l", "stride_weight",
    "stride_target_weight_r",
)  # fmt: skip
_ALIGNED = (
    "num_rows", "stride_n", "stride_r", "stride_mean_g", "stride_mean_r", "stride_std_g",
    "stride_std_r", "stride_target_m", "stride_target_r", "stride_target_weight_g",
    "stride_target_weight_m",
)  # fmt: skip
_WEIGHTED = {"has_target_weights": True}


def _problem(target: Target, dtype: torch.dtype, **changes: Any) -> Problem:
    options: dict[str, Any] = {
        "num_samples": NUM_SAMPLES,
        "width": WIDTH,
        "exponent": 1.0,
        "dtype": dtype,
        "need_samples": True,
        "need_posterior": False,
        "has_weight": True,
        "arch": target.name,
        "has_fast_math": target.is_nvidia,
    }
    return Problem(**options | changes)


def _trips(constants: dict[str, Any], *inner: int) -> tuple[int, ...]:
    """Loops inside the one over blocks of samples, which one block does not need."""
    blocks = math.ceil(constants["NUM_SAMPLES"] / constants["BLOCK_N"])
    return (blocks, *inner) if blocks > 1 else inner


def _pairs(constants: dict[str, Any]) -> int:
    """Trips of the loop over the samples that one is compared with."""
    return Fixed(constants["NUM_SAMPLES"])


def _case(name: str, dtype: torch.dtype, changes: dict[str, Any], **rest: Any) -> Configuration:
    """What the three kernels share; traffic is samples in and out, mean and log_std in."""
    width, count = changes.get("width", WIDTH), changes.get("num_samples", NUM_SAMPLES)
    traffic = (2 * count + 2) * width * dtype.itemsize
    # The gradient of float16 samples is float32.
    types = _TYPES | ({"dsamples_ptr": "*fp32"} if dtype == torch.float16 else {})
    defaults = {"bytes_per_row": traffic, "types": types, "ones": _ONES, "aligned": _ALIGNED}
    return Configuration(name=f"energy_score.{name}", dtype=dtype, **defaults | rest)


def _analytic(
    name: str, dtype: torch.dtype, *, is_far: bool, budget: int | None = None,
    is_main: bool = False, **changes: Any,
) -> Configuration:  # fmt: skip
    width, exponent = changes.get("width", WIDTH), changes.get("exponent", 1.0)
    inner: tuple[int, ...] = (nodes(exponent, width).num_nodes if is_far else 0,)
    rest: dict[str, Any] = {"budget": budget}
    if "has_target_weights" in changes:
        inner = (NUM_GAUSSIANS, *inner)
        vectors = 2 * changes.get("num_samples", NUM_SAMPLES) + 2 * NUM_GAUSSIANS
        rest["bytes_per_row"] = vectors * width * dtype.itemsize
    return _case(
        f"analytic.{name}",
        dtype,
        changes,
        kernel=analytic_kernel,
        constants=lambda target: analytic_constants(_problem(target, dtype, **changes)),
        trips=lambda constants: _trips(constants, *inner, _pairs(constants)),
        **rest,
        is_main=is_main,
    )


def _gram(
    name: str, dtype: torch.dtype, *, is_antithetic: bool, budget: int | None = None,
    is_main: bool = False, **changes: Any,
) -> Configuration:  # fmt: skip
    draws = NUM_TARGETS // 2 if is_antithetic else NUM_TARGETS
    return _case(
        f"drawn.{name}",
        dtype,
        changes,
        kernel=gram_kernel,
        constants=lambda target: gram_constants(
            _problem(target, dtype, **changes), is_antithetic=is_antithetic
        ),
        trips=lambda constants: _trips(
            constants, math.ceil(draws / constants["BLOCK_M"]), _pairs(constants)
        ),
        budget=budget,
        is_main=is_main,
    )


def _direct(
    name: str, dtype: torch.dtype, *, is_given: bool, is_drawn: bool = False,
    is_antithetic: bool = False, need_targets: bool = False, is_main: bool = False, **changes: Any,
) -> Configuration:  # fmt: skip
    width, draws = changes.get("width", WIDTH), NUM_TARGETS // 2 if is_antithetic else NUM_TARGETS
    passes = 0 if is_drawn else 2 if need_targets else 1
    targets = passes * NUM_TARGETS * width * dtype.itemsize
    return _case(
        name,
        dtype,
        changes,
        kernel=direct_kernel,
        constants=lambda target: direct_constants(
            _problem(target, dtype, **changes),
            is_given=is_given,
            is_drawn=is_drawn,
            is_antithetic=is_antithetic,
            need_targets=need_targets,
        ),
        trips=lambda constants: _trips(constants, _pairs(constants), draws),
        bytes_per_row=(2 * changes.get("num_samples", NUM_SAMPLES) + 2) * width * dtype.itemsize
        + targets,
        is_main=is_main,
    )


def _analytic_cases() -> Iterator[Configuration]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    posterior = {"need_posterior": True}
    yield _analytic("series", bf16, is_far=False, budget=3000, is_main=True)
    yield _analytic("quadrature", bf16, is_far=True, budget=8500, is_main=True)
    yield _analytic("quadrature.fp16", fp16, is_far=True)
    yield _analytic("quadrature.fp32", fp32, is_far=True)
    yield _analytic("quadrature.exponent-0.5", bf16, is_far=True, exponent=0.5)
    yield _analytic("quadrature.N5", bf16, is_far=True, num_samples=5)
    yield _analytic("quadrature.N16", bf16, is_far=True, num_samples=16)
    yield _analytic("quadrature.L32", bf16, is_far=True, width=32)
    yield _analytic("quadrature.L8", fp32, is_far=True, width=8)
    yield _analytic("series.L1024", bf16, is_far=False, width=1024, is_main=True)
    yield _analytic("series.L1024.fp32", fp32, is_far=False, width=1024)
    yield _analytic("posterior", bf16, is_far=True, is_main=True, **posterior)
    yield _analytic("posterior.fp32", fp32, is_far=True, **posterior)
    yield _analytic("posterior.exponent-1.5", bf16, is_far=True, exponent=1.5, **posterior)
    yield _analytic("posterior.N5", bf16, is_far=True, num_samples=5, **posterior)
    yield _analytic("posterior.N16", fp32, is_far=True, num_samples=16, **posterior)
    yield _analytic("posterior.L32", bf16, is_far=True, width=32, **posterior)
    yield _analytic("posterior.L512", bf16, is_far=True, width=512, **posterior)
    yield _analytic("posterior.L1024", bf16, is_far=True, width=1024, is_main=True, **posterior)
    yield _analytic("posterior.L1024.fp32", fp32, is_far=True, width=1024, **posterior)
    yield _analytic(
        "posterior.L1024.N16", bf16, is_far=True, width=1024, num_samples=16, **posterior
    )
    every = _WEIGHTED | posterior | {"need_target_weights": True}
    yield _analytic("mixture.series", bf16, is_far=False, is_main=True, **_WEIGHTED)
    yield _analytic("mixture.quadrature", bf16, is_far=True, is_main=True, **_WEIGHTED)
    yield _analytic("mixture.fp32", fp32, is_far=True, **_WEIGHTED)
    yield _analytic("mixture.N16", bf16, is_far=True, num_samples=16, **_WEIGHTED)
    yield _analytic("mixture.L32", bf16, is_far=True, width=32, **_WEIGHTED)
    yield _analytic("mixture.L1024", bf16, is_far=True, width=1024, **_WEIGHTED)
    yield _analytic("mixture.posterior", bf16, is_far=True, is_main=True, **every)
    yield _analytic("mixture.posterior.N16", fp32, is_far=True, num_samples=16, **every)
    yield _analytic("mixture.posterior.L512", bf16, is_far=True, width=512, **every)
    yield _analytic("mixture.posterior.L1024", fp32, is_far=True, width=1024, **every)


def _gram_cases() -> Iterator[Configuration]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    sampled: dict[str, Any] = {"is_antithetic": False}
    posterior = {"need_posterior": True}
    yield _gram("antithetic", bf16, is_antithetic=True, budget=9000, is_main=True)
    yield _gram("sample", bf16, budget=13000, is_main=True, **sampled)
    yield _gram("sample.fp16", fp16, **sampled)
    yield _gram("sample.fp32", fp32, is_main=True, **sampled)
    yield _gram("sample.exponent-0.5", bf16, exponent=0.5, **sampled)
    yield _gram("sample.N5", bf16, num_samples=5, **sampled)
    yield _gram("sample.N16", bf16, num_samples=16, **sampled)
    yield _gram("sample.N16.fp32", fp32, num_samples=16, **sampled)
    yield _gram("sample.L64", bf16, width=64, **sampled)
    yield _gram("sample.L256", bf16, width=256, **sampled)
    yield _gram("sample.L512", bf16, width=512, **sampled)
    yield _gram("sample.posterior.L512", bf16, width=512, **sampled, **posterior)
    for case in (
        _gram("sample.L1024", bf16, width=1024, **sampled),
        _gram("antithetic.L1024", bf16, width=1024, is_antithetic=True),
        _gram("sample.posterior.L1024", bf16, width=1024, **sampled, **posterior),
    ):
        yield replace(case, targets=("sm_80", "sm_90"))
    yield _gram("sample.L256.fp32", fp32, width=256, **sampled)
    yield _gram("sample.posterior", bf16, **sampled, **posterior)
    yield _gram("sample.posterior.fp32", fp32, **sampled, **posterior)
    yield _gram("sample.posterior.N16", bf16, num_samples=16, **sampled, **posterior)
    yield _gram("sample.posterior.N16.fp32", fp32, num_samples=16, **sampled, **posterior)
    yield _gram("sample.posterior.L256", bf16, width=256, **sampled, **posterior)
    yield _gram("sample.posterior.L256.fp32", fp32, width=256, **sampled, **posterior)
    yield _gram("antithetic.posterior", bf16, is_antithetic=True, **posterior)
    yield _gram("antithetic.posterior.fp32", fp32, is_antithetic=True, **posterior)


def _direct_cases() -> Iterator[Configuration]:
    bf16, fp32 = torch.bfloat16, torch.float32
    drawn: dict[str, Any] = {"is_given": False, "is_drawn": True}
    yield _direct("drawn.direct.L32", bf16, width=32, need_posterior=True, **drawn)
    yield replace(
        _direct("drawn.direct.L1024", bf16, width=1024, **drawn), targets=("sm_100", "gfx942")
    )
    yield _direct("drawn.direct.L512.fp32", fp32, width=512, **drawn)
    yield _direct("drawn.direct.L1024.posterior", fp32, width=1024, need_posterior=True, **drawn)
    yield _direct("drawn.direct.antithetic.L1024", fp32, width=1024, is_antithetic=True, **drawn)
    yield _direct("drawn.noise", bf16, is_given=False)
    yield _direct("drawn.noise.posterior", bf16, is_given=False, need_posterior=True)
    yield _direct("given", bf16, is_given=True)
    yield _direct("given.fp32", fp32, is_given=True, is_main=True)
    yield _direct("given.fp32.dtargets", fp32, is_given=True, need_targets=True, is_main=True)
    yield _direct("given.N16.dtargets", bf16, is_given=True, need_targets=True, num_samples=16)
    yield _direct("given.L1024.dtargets", fp32, is_given=True, need_targets=True, width=1024)
    given: dict[str, Any] = {"is_given": True, **_WEIGHTED}
    every = given | {"need_targets": True, "need_target_weights": True}
    yield _direct("weighted", bf16, **given)
    yield _direct("weighted.fp32", fp32, is_main=True, **given)
    yield _direct("weighted.fp32.dtargets", fp32, is_main=True, need_targets=True, **given)
    yield _direct("weighted.fp32.dweights", fp32, is_main=True, **every)
    yield _direct("weighted.N16.dweights", bf16, num_samples=16, **every)
    yield _direct("weighted.L1024.dweights", fp32, width=1024, **every)


def cases() -> Iterator[Configuration]:
    """The analytic score, targets drawn for matmuls, and direct differences."""
    yield from _analytic_cases()
    yield from _gram_cases()
    yield from _direct_cases()
