"""Launch settings of every kernel, from one table: nothing is tuned at import, at a launch or on
sequence length.

A setting is found by operation, architecture and width bucket; an architecture that is not listed
takes the default row. Results never depend on these numbers, beyond rounding and the choice of
series or quadrature where both are accurate.
"""

from dataclasses import dataclass
from typing import Any

import torch

from calm_kernels.backend import is_interpreted

__all__ = [
    "Launch",
    "PatchTile",
    "architecture",
    "launch_options",
    "patch_tile",
    "setting",
    "use_fast_math",
]

DEFAULT = "default"


@dataclass(frozen=True)
class Launch:
    """How one kernel is launched; which fields it reads is the kernel's own business."""

    num_warps: int = 1
    num_stages: int = 1
    features_per_lane: int = 32
    block_n: int = 8
    block_m: int = 16
    block_rows: int = 8


# (operation, architecture, largest width it is for); ".heavy" also differentiates the target.
TABLE: dict[tuple[str, str, int], Launch] = {
    ("energy_score.analytic", DEFAULT, 1024): Launch(),
    ("energy_score.analytic.heavy", DEFAULT, 1024): Launch(features_per_lane=16),
    ("energy_score.analytic.heavy", "sm_80", 1024): Launch(features_per_lane=8),
    ("energy_score.direct", DEFAULT, 1024): Launch(),
    ("energy_score.direct.heavy", DEFAULT, 1024): Launch(features_per_lane=16),
    ("energy_score.gram", DEFAULT, 128): Launch(num_warps=1),
    ("energy_score.gram", DEFAULT, 256): Launch(num_warps=2),
    ("energy_score.gram", "gfx942", 128): Launch(num_warps=1, block_n=16),
    ("energy_score.gram", "gfx942", 256): Launch(num_warps=4, block_n=16),
    ("energy_score.gram.heavy", DEFAULT, 128): Launch(num_warps=2),
    ("energy_score.gram.heavy", DEFAULT, 256): Launch(num_warps=4),
    ("energy_score.gram.heavy", "gfx942", 128): Launch(num_warps=2, block_n=16),
    ("energy_score.gram.heavy", "gfx942", 256): Launch(num_warps=4, block_n=16),
    ("reparameterize", DEFAULT, 4096): Launch(num_warps=4, block_rows=8),
}


def architecture(device: torch.device) -> str:
    """Name of a device in the table: ``sm_90``, ``gfx942``, or ``default`` off the GPU."""
    if device.type != "cuda":
        return DEFAULT
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def setting(operation: str, arch: str, width: int) -> Launch:
    """The table's row for `width` features, of this architecture if it has one of its own."""
    for name in (arch, DEFAULT):
        widths = [key[2] for key in TABLE if key[:2] == (operation, name) and key[2] >= width]
        if widths:
            return TABLE[operation, name, min(widths)]
    raise ValueError(f"{operation} has no launch setting for width {width}")


def use_fast_math() -> bool:
    """Whether kernels may use NVIDIA's special-function instructions through inline assembly."""
    return torch.version.hip is None and not is_interpreted()


def launch_options(launch: Launch, num_warps: int | None = None) -> dict[str, Any]:
    """Compiler options of a launch; multiply-add fusion is named because its default changes with
    Triton 3.10.
    """
    return {
        "num_warps": launch.num_warps if num_warps is None else num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": True,
    }


@dataclass(frozen=True)
class PatchTile:
    """How the samples of a patch lie in registers, and the warps that hold them.

    A lane has `pieces` times `inner` features of a sample; `lanes` lanes share it.
    """

    pieces: int
    block_n: int
    lanes: int
    inner: int
    num_warps: int

    def constants(self, lane_axis: int) -> dict[str, int]:
        """The tile ``[OUTER, BLOCK_N, LANES, INNER]``; see `calm_kernels.device.LANE_AXIS`."""
        outer, lanes = (self.lanes, self.pieces) if lane_axis == 0 else (self.pieces, self.lanes)
        return {"OUTER": outer, "BLOCK_N": self.block_n, "LANES": lanes, "INNER": self.inner}


def patch_tile(launch: Launch, num_samples: int, width: int, itemsize: int) -> PatchTile:
    """Split `width` features over lanes: 16 bytes at a time, at most `features_per_lane` in each.

    A lane multiplies its own 1 + 2tσ² in the quadrature, whose nodes reach further for small
    widths: fewer features keep that product within float32.
    """
    block = 1 << (width - 1).bit_length()
    most = launch.features_per_lane if width >= 64 else 8 if width >= 8 else 4
    per_lane = min(block, most)
    inner = min(per_lane, 16 // itemsize)
    lanes = block // per_lane
    block_n = min(launch.block_n, 1 << (num_samples - 1).bit_length())
    return PatchTile(per_lane // inner, block_n, lanes, inner, max(1, block_n * lanes // 32))
