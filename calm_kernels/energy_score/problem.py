"""What a launch of an energy score kernel depends on: sizes, dtypes, gradients and the machine."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from calm_kernels.backend import is_interpreted
from calm_kernels.device import LANE_AXIS
from calm_kernels.tuning import (
    Constants,
    Launch,
    architecture,
    launch_options,
    sample_tile,
    setting,
    use_fast_math,
    warp_size,
)

__all__ = ["Problem", "pointer_and_strides"]


class Problem(NamedTuple):
    """The sizes, dtypes, gradients and machine that the constants of a launch depend on."""

    num_samples: int
    width: int
    exponent: float
    dtype: torch.dtype
    need_samples: bool
    need_posterior: bool
    has_weight: bool
    arch: str
    has_fast_math: bool
    has_target_weights: bool = False
    need_target_weights: bool = False
    can_round: bool = True  # the interpreter would multiply bf16 operands as bit patterns

    @classmethod
    def of(
        cls, samples: Tensor, weight: Tensor | None, exponent: float, *, need_samples: bool,
        need_posterior: bool, target_weights: Tensor | None = None,
        need_target_weights: bool = False,
    ) -> "Problem":  # fmt: skip
        """Of samples ``[N, R, L]`` on this machine."""
        num_samples, _, width = samples.shape
        return cls(
            num_samples=num_samples,
            width=width,
            exponent=exponent,
            dtype=samples.dtype,
            need_samples=need_samples,
            need_posterior=need_posterior,
            has_weight=weight is not None,
            arch=architecture(samples.device),
            has_fast_math=use_fast_math(),
            has_target_weights=target_weights is not None,
            need_target_weights=need_target_weights,
            can_round=not is_interpreted(),
        )

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

    def weighted(self) -> dict[str, Any]:
        """Constants of the kernels that take weights of targets."""
        return {
            "HAS_TARGET_WEIGHTS": self.has_target_weights,
            "NEED_TARGET_WEIGHTS": self.need_target_weights,
        }

    def tiled(self, operation: str) -> Constants:
        """Common constants with those of a tile of samples, and the options of its launch."""
        launch = self.setting(operation)
        tile = sample_tile(
            launch, self.num_samples, self.width, self.dtype.itemsize, warp_size(self.arch)
        )
        return self.common() | tile.constants(LANE_AXIS.value), launch_options(
            launch, tile.num_warps
        )


def pointer_and_strides(
    weight: Tensor | None, samples: Tensor, num_axes: int = 1
) -> tuple[Tensor, tuple[int, ...]]:
    """The weight and its strides; without a weight a pointer that the kernels do not read."""
    return (samples, (0,) * num_axes) if weight is None else (weight, weight.stride())
