"""The kernel configurations that ship, at the reference size: 8192 patches, N = 8 samples, M = 100
targets, L = 128.

A configuration compiles what a launch would: the same constants, the specialisations that Triton
derives from aligned tensors, strides of contiguous memory.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.compiler import ASTSource

from calm_kernels.compiling.targets import Target
from calm_kernels.energy_score import launch
from calm_kernels.energy_score.direct_kernels import direct_kernel
from calm_kernels.energy_score.gram_kernels import gram_kernel
from calm_kernels.energy_score.kernels import analytic_kernel
from calm_kernels.energy_score.nodes import nodes
from calm_kernels.reparameterize import function as reparameterize
from calm_kernels.reparameterize.kernels import backward_kernel, forward_kernel

__all__ = ["Configuration", "compile_kernel", "configurations"]

PATCHES, NUM_SAMPLES, NUM_TARGETS, WIDTH = 8192, 8, 100, 128
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
Constants = tuple[dict[str, Any], dict[str, Any]]


@dataclass(frozen=True)
class Configuration:
    """One compiled form of a kernel, and what is expected of it."""

    name: str
    kernel: Any
    dtype: torch.dtype
    constants: Callable[[Target], Constants]
    trips: Callable[[dict[str, Any]], tuple[int, ...]]  # of each loop, in the order of the code
    bytes_per_patch: int
    budget: int | None = None  # warp instructions a patch, with NVIDIA's special functions
    patches_per_program: Callable[[dict[str, Any]], int] = lambda constants: 1
    float32_names: tuple[str, ...] = ()  # pointers that are float32 whatever the inputs are

    @property
    def operation(self) -> str:
        """What `--op` selects."""
        return self.name.split(".")[0]


_FLOAT32 = (
    "weight_ptr", "terms_ptr", "dmean_ptr", "dlog_std_ptr", "dtargets_ptr", "kl_ptr", "dkl_ptr",
)  # fmt: skip
_INT64 = ("seed_ptr", "first_row_ptr")
_FLOATS = ("first", "step", "log_scale", "kl_floor", "dropout")
_UNIT_STRIDES = (
    "stride_l", "stride_mean_l", "stride_std_l", "stride_target_l", "stride_weight",
    "stride_noise_l", "stride_keep_l", "stride_dlatent_l", "stride_dkl",
)  # fmt: skip
_ALIGNED = (
    "num_rows", "stride_n", "stride_r", "stride_mean_r", "stride_std_r", "stride_target_m",
    "stride_target_r", "stride_noise_r", "stride_keep_r", "stride_dlatent_r",
)  # fmt: skip


def _type(name: str, configuration: Configuration) -> str:
    """Triton's type of a run-time argument."""
    if name == "keep_ptr":
        return "*i1"
    if name in _INT64:
        return "*i64"
    if name.endswith("_ptr"):
        is_float32 = name in _FLOAT32 or name in configuration.float32_names
        return "*fp32" if is_float32 else f"*{_NAMES[configuration.dtype]}"
    return "fp32" if name in _FLOATS else "i32"


def compile_kernel(configuration: Configuration, target: Target) -> tuple[Any, dict[str, Any]]:
    """The compiled kernel and its constants."""
    constants, options = configuration.constants(target)
    names = configuration.kernel.arg_names
    fixed = {name: 1 for name in names if name in _UNIT_STRIDES} | constants
    signature = {
        name: "constexpr" if name in fixed else _type(name, configuration) for name in names
    }
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or (name in _ALIGNED and name not in fixed)
    }
    values = {(names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(configuration.kernel, signature, constexprs=values, attrs=aligned)
    return triton.compile(source, target=target.gpu(), options=options), constants


def _problem(target: Target, dtype: torch.dtype, **changes: Any) -> launch.Problem:
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
    return launch.Problem(**options | changes)


def _bytes(dtype: torch.dtype, width: int = WIDTH) -> int:
    """Samples in and out, mean and log_std in, per patch."""
    return (2 * NUM_SAMPLES + 2) * width * dtype.itemsize


def _analytic(
    name: str, dtype: torch.dtype, *, is_far: bool, budget: int | None = None, **changes: Any
) -> Configuration:
    width, exponent = changes.get("width", WIDTH), changes.get("exponent", 1.0)
    count = nodes(exponent, width).num_nodes if is_far else 0
    return Configuration(
        name=f"energy_score.analytic.{name}",
        kernel=analytic_kernel,
        dtype=dtype,
        constants=lambda target: launch.analytic(_problem(target, dtype, **changes)),
        trips=lambda _: (count, NUM_SAMPLES),
        bytes_per_patch=_bytes(dtype, width),
        budget=budget,
    )


def _gram(
    name: str, dtype: torch.dtype, *, is_antithetic: bool, budget: int | None = None, **changes: Any
) -> Configuration:
    draws = NUM_TARGETS // 2 if is_antithetic else NUM_TARGETS
    return Configuration(
        name=f"energy_score.drawn.{name}",
        kernel=gram_kernel,
        dtype=dtype,
        constants=lambda target: launch.gram(
            _problem(target, dtype, **changes), is_antithetic=is_antithetic
        ),
        trips=lambda constants: (math.ceil(draws / constants["BLOCK_M"]), NUM_SAMPLES),
        bytes_per_patch=_bytes(dtype, changes.get("width", WIDTH)),
        budget=budget,
    )


def _direct(
    name: str,
    dtype: torch.dtype,
    *,
    is_given: bool,
    is_drawn: bool = False,
    need_targets: bool = False,
    **changes: Any,
) -> Configuration:
    width = changes.get("width", WIDTH)
    count = 0 if is_drawn else 2 if need_targets else 1
    return Configuration(
        name=f"energy_score.{name}",
        kernel=direct_kernel,
        dtype=dtype,
        constants=lambda target: launch.direct(
            _problem(target, dtype, **changes),
            is_given=is_given,
            is_drawn=is_drawn,
            is_antithetic=False,
            need_targets=need_targets,
        ),
        trips=lambda _: (NUM_SAMPLES, NUM_TARGETS),
        bytes_per_patch=_bytes(dtype, width) + count * NUM_TARGETS * width * dtype.itemsize,
    )


def _reparameterize(
    name: str, kernel: Any, traffic: int, *, is_given: bool = False, budget: int | None = None
) -> Configuration:
    """Traffic in elements of 16 bits a latent."""
    return Configuration(
        name=f"reparameterize.{name}",
        kernel=kernel,
        dtype=torch.bfloat16,
        constants=lambda target: reparameterize.constants(
            WIDTH,
            target.name,
            is_given=is_given,
            keep=1 if is_given else 2,
            has_fast_math=target.is_nvidia,
        ),
        trips=lambda _: (),
        bytes_per_patch=2 * traffic * WIDTH,
        budget=budget,
        patches_per_program=lambda constants: constants["BLOCK_ROWS"],
    )


def configurations() -> Iterator[Configuration]:
    """All that ship."""
    bf16, fp32 = torch.bfloat16, torch.float32
    yield _analytic("series", bf16, is_far=False, budget=3000)
    yield _analytic("quadrature", bf16, is_far=True, budget=8500)
    yield _analytic("quadrature.fp32", fp32, is_far=True)
    yield _analytic("quadrature.exponent-0.5", bf16, is_far=True, exponent=0.5)
    yield _analytic("quadrature.posterior", bf16, is_far=True, need_posterior=True)
    yield _analytic("quadrature.posterior.fp32", fp32, is_far=True, need_posterior=True)
    yield _analytic("series.L1024", bf16, is_far=False, width=1024)
    yield _gram("antithetic", bf16, is_antithetic=True, budget=9000)
    yield _gram("sample", bf16, is_antithetic=False, budget=13000)
    yield _gram("sample.fp32", fp32, is_antithetic=False)
    yield _gram("sample.posterior", bf16, is_antithetic=False, need_posterior=True)
    yield _gram("sample.L256", bf16, is_antithetic=False, width=256)
    yield _direct("drawn.sample.L1024", bf16, is_given=False, is_drawn=True, width=1024)
    yield _direct("drawn.noise", bf16, is_given=False)
    yield _direct("given.fp32", fp32, is_given=True)
    yield _direct("given.fp32.dtargets", fp32, is_given=True, need_targets=True)
    yield _reparameterize("forward", forward_kernel, 3, budget=400)
    yield _reparameterize("backward", backward_kernel, 5, budget=400)
    yield _reparameterize("forward.given", forward_kernel, 4, is_given=True)
    yield _reparameterize("backward.given", backward_kernel, 6, is_given=True)
