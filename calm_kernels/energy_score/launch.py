"""Compile-time constants and compiler options of the energy score's kernels, for a launch or a
compile report.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from calm_kernels.device import LANE_AXIS
from calm_kernels.energy_score.expectation import SERIES_MIN_LATENT
from calm_kernels.energy_score.nodes import nodes
from calm_kernels.energy_score.series import MAX_R2, MAX_SHARE
from calm_kernels.tuning import Launch, launch_options, patch_tile, setting, warp_size, widest

__all__ = ["Problem", "analytic", "direct", "gram", "takes_gram"]

# Fewer dimensions leave d and z too far from orthogonal for a product of rounded operands; more
# need registers and shared memory that not every machine has.
GRAM_WIDTHS = range(64, 257)

Constants = tuple[dict[str, Any], dict[str, Any]]


@dataclass(frozen=True)
class Problem:
    """What the choice of constants depends on: sizes, dtypes, gradients, and the machine."""

    num_samples: int
    width: int
    exponent: float
    dtype: torch.dtype
    need_samples: bool
    need_posterior: bool
    has_weight: bool
    arch: str
    has_fast_math: bool
    can_round: bool = True  # the interpreter multiplies bf16 operands of a product as bit patterns

    def setting(self, operation: str) -> Launch:
        """The table's row for this problem."""
        name = f"energy_score.{operation}" + (".heavy" if self.need_posterior else "")
        found = setting(name, self.arch, self.width)
        if self.num_samples <= found.block_n:
            return found
        return setting(f"{name}.blocks", self.arch, self.width)

    def common(self) -> dict[str, Any]:
        """Constants that every kernel takes."""
        return {
            "NUM_SAMPLES": self.num_samples,
            "WIDTH": self.width,
            "EXPONENT": self.exponent,
            "NEED_SAMPLES": self.need_samples,
            "NEED_POSTERIOR": self.need_posterior,
            "HAS_WEIGHT": self.has_weight,
            "FAST": self.has_fast_math,
        }

    def tiled(self, operation: str) -> Constants:
        """Common constants with those of a patch tile, and the options of its launch."""
        launch = self.setting(operation)
        tile = patch_tile(
            launch, self.num_samples, self.width, self.dtype.itemsize, warp_size(self.arch)
        )
        return self.common() | tile.constants(LANE_AXIS.value), launch_options(
            launch, tile.num_warps
        )


def analytic(problem: Problem) -> Constants:
    """For `kernels.analytic_kernel`."""
    constants, options = problem.tiled("analytic")
    constants |= {
        "NUM_NODES": nodes(problem.exponent, problem.width).num_nodes,
        "MAX_R2": MAX_R2,
        "MAX_SHARE": MAX_SHARE,
        "MAX_EXCESS": 1.0 if problem.width >= SERIES_MIN_LATENT else -1.0,
    }
    return constants, options


def direct(
    problem: Problem, *, is_given: bool, is_drawn: bool, is_antithetic: bool, need_targets: bool
) -> Constants:
    """For `direct_kernels.direct_kernel`."""
    constants, options = problem.tiled("direct")
    constants |= {
        "IS_GIVEN": is_given,
        "IS_DRAWN": is_drawn,
        "IS_ANTITHETIC": is_antithetic,
        "NEED_TARGETS": need_targets,
    }
    return constants, options


def takes_gram(problem: Problem) -> bool:
    """Whether drawn targets are compared by products; by direct differences otherwise."""
    if problem.width in GRAM_WIDTHS or problem.dtype.itemsize > 2:
        return problem.width in GRAM_WIDTHS
    widest_row = widest("energy_score.gram.wide", problem.arch)
    return GRAM_WIDTHS.stop <= problem.width <= widest_row


def gram(problem: Problem, *, is_antithetic: bool) -> Constants:
    """For `gram_kernels.gram_kernel`: products of bf16 for 16-bit inputs, of tf32 for float32 (AMD:
    float32).
    """
    launch = problem.setting("gram" if problem.width in GRAM_WIDTHS else "gram.wide")
    is_rounded = problem.dtype.itemsize == 2 and problem.can_round
    words = -(-problem.width // 8)
    constants = problem.common() | {
        "IS_ANTITHETIC": is_antithetic,
        "BLOCK_N": launch.block_n,
        "BLOCK_Q": max(16, 1 << (words - 1).bit_length()),
        "BLOCK_M": launch.block_m,
        "DOT_DTYPE": tl.bfloat16 if is_rounded else tl.float32,
        "PRECISION": "ieee" if is_rounded or not problem.has_fast_math else "tf32",
    }
    return constants, launch_options(launch)
