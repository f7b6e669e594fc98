"""Launch settings of every kernel, from one table: nothing is tuned at run time.

A setting is found by operation, architecture and width; an architecture without a row takes the
default row. Results do not depend on these numbers, beyond rounding and the choice of series or
quadrature where both are accurate.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from calm_kernels.backend import is_interpreted

__all__ = [
    "Constants",
    "Launch",
    "SampleTile",
    "architecture",
    "fuses_head",
    "fuses_layers",
    "launch_options",
    "num_processors",
    "sample_tile",
    "setting",
    "use_fast_math",
    "warp_size",
    "widest",
]

# Compile-time constants of a kernel, and the options of its compiler.
Constants = tuple[dict[str, Any], dict[str, Any]]
DEFAULT = "default"
MANY = 2**62
# Size of an energy head's residual stream; beyond either, the library's matmuls are faster.
FUSED_HEAD_ROWS, FUSED_HEAD_ELEMENTS = 1024, 2**20
FUSED_LAYER_ROWS = 64  # of the backbone and the decoder; likewise


@dataclass(frozen=True)
class Launch:
    """How one kernel is launched; each kernel reads the fields that it needs."""

    num_warps: int = 1
    num_stages: int = 1
    features_per_lane: int = 32
    block_n: int = 8
    block_m: int = 16
    block_rows: int = 8
    block_vocab: int = 128  # tokens of linear_argmax
    block_outputs: int = 128  # output features of a fused layer of the energy head
    block_features: int = 64  # summed over in one step of a matmul
    programs_per_processor: int = 1
    # Wider rows than this take the library's matmul, which then is ahead by more than logits in
    # memory cost. Modelled, not measured: see calm_kernels/linear_argmax/README.md.
    fused_width: int = MANY


_FEW_ARGMAX_ROWS = {
    16: Launch(
        num_warps=4, num_stages=3, block_rows=16, block_features=128, programs_per_processor=3
    ),
    64: Launch(num_warps=4, num_stages=4, block_rows=64, programs_per_processor=2),
}

# (operation, architecture): settings by the largest width that each is for. Suffixes name forms
# that take more registers: ".heavy" also differentiates the target, ".mixture" loops over
# Gaussians, ".blocks" over blocks of samples. Without a row of its own a form takes that of its
# name without the last suffix.
TABLE: dict[tuple[str, str], dict[int, Launch]] = {
    ("energy_score.analytic", DEFAULT): {
        512: Launch(block_n=16),
        1024: Launch(),
    },
    ("energy_score.analytic", "gfx942"): {1024: Launch(features_per_lane=16)},
    ("energy_score.analytic.blocks", DEFAULT): {
        512: Launch(features_per_lane=16),
        1024: Launch(features_per_lane=16, block_n=4),
    },
    ("energy_score.analytic.heavy", DEFAULT): {
        512: Launch(features_per_lane=16),
        1024: Launch(features_per_lane=16, block_n=4),
    },
    ("energy_score.analytic.heavy", "sm_80"): {
        64: Launch(features_per_lane=8),
        512: Launch(features_per_lane=8, block_n=4),
        1024: Launch(features_per_lane=8, block_n=2),
    },
    ("energy_score.analytic.heavy.mixture", "sm_80"): {
        64: Launch(features_per_lane=8),
        256: Launch(features_per_lane=8, block_n=4),
        1024: Launch(features_per_lane=8, block_n=2),
    },
    ("energy_score.direct", DEFAULT): {1024: Launch()},
    ("energy_score.direct", "gfx942"): {1024: Launch(features_per_lane=16)},
    ("energy_score.direct.heavy", DEFAULT): {1024: Launch(features_per_lane=16)},
    ("energy_score.gram", DEFAULT): {
        128: Launch(num_warps=1),
        256: Launch(num_warps=2),
    },
    ("energy_score.gram", "gfx942"): {
        128: Launch(num_warps=1, block_n=16),
        256: Launch(num_warps=4, block_n=16),
    },
    ("energy_score.gram.heavy", DEFAULT): {
        128: Launch(num_warps=2),
        256: Launch(num_warps=4),
    },
    ("energy_score.gram.heavy.blocks", "sm_80"): {128: Launch(num_warps=4)},
    ("energy_score.gram.heavy", "gfx942"): {
        128: Launch(num_warps=2, block_n=16),
        256: Launch(num_warps=4, block_n=16),
    },
    # More than 256 features of 16 bits: where registers and shared memory are known to suffice.
    ("energy_score.gram.wide", "sm_80"): {
        512: Launch(num_warps=4),
        1024: Launch(num_warps=8),
    },
    ("energy_score.gram.wide", "sm_90"): {
        512: Launch(num_warps=4),
        1024: Launch(num_warps=8),
    },
    ("energy_score.gram.wide", "sm_100"): {512: Launch(num_warps=8)},
    ("energy_score.gram.wide", "gfx942"): {512: Launch(num_warps=4, block_n=16)},
    ("agreeing_patch.count", DEFAULT): {MANY: Launch(num_warps=8, block_n=32, block_rows=64)},
    ("agreeing_patch.choose", DEFAULT): {
        1024: Launch(num_warps=4),
        4096: Launch(num_warps=8),
    },
    ("reparameterize", DEFAULT): {4096: Launch(num_warps=4, block_rows=8)},
    # Rows a program; of ".groups", into how many groups of rows the sums over rows are split.
    ("energy_head.groups", DEFAULT): {4096: Launch(block_rows=264)},
    ("energy_head.activation", DEFAULT): {4096: Launch(num_warps=4, block_rows=8)},
    ("energy_head.norm", DEFAULT): {
        1024: Launch(num_warps=4, block_rows=4),
        4096: Launch(num_warps=8, block_rows=2),
    },
    ("energy_head.norm.backward", DEFAULT): {
        1024: Launch(num_warps=8, block_rows=2),
        4096: Launch(num_warps=8, block_rows=1),
    },
    ("energy_head.embed", DEFAULT): {4096: Launch(num_warps=8, block_rows=32)},
    ("energy_head.embed", "gfx942"): {4096: Launch(num_warps=4, block_rows=16, block_features=128)},
    ("energy_head.embed.backward", DEFAULT): {4096: Launch(num_warps=8, block_rows=32)},
    ("energy_head.embed.backward", "gfx942"): {4096: Launch(num_warps=4, block_rows=16)},
    # The width of a fused layer is its number of rows. ".norm" normalises them as they are loaded,
    # in every program again: its programs take few rows and many outputs.
    ("energy_head.layer", DEFAULT): {
        16: Launch(num_warps=4, num_stages=4, block_rows=16, block_outputs=16, block_features=256),
        256: Launch(num_warps=4, num_stages=5, block_rows=64, block_outputs=32),
        MANY: Launch(num_warps=4, num_stages=4, block_rows=64, block_outputs=64),
    },
    ("energy_head.layer", "gfx942"): {
        16: Launch(num_warps=4, num_stages=2, block_rows=16, block_outputs=16, block_features=256),
        256: Launch(num_warps=4, num_stages=2, block_rows=64, block_outputs=32),
        MANY: Launch(num_warps=4, num_stages=2, block_rows=64, block_outputs=64),
    },
    ("energy_head.layer.norm", DEFAULT): {
        16: Launch(num_warps=4, num_stages=3, block_rows=16, block_outputs=16, block_features=256),
        256: Launch(num_warps=4, num_stages=3, block_rows=32, block_outputs=64, block_features=128),
        MANY: Launch(num_warps=8, num_stages=3, block_rows=64, block_outputs=128),
    },
    ("energy_head.layer.norm", "gfx942"): {
        16: Launch(num_warps=4, num_stages=2, block_rows=16, block_outputs=16, block_features=256),
        256: Launch(num_warps=4, num_stages=2, block_rows=32, block_outputs=64, block_features=128),
        MANY: Launch(num_warps=8, num_stages=2, block_rows=64, block_outputs=128),
    },
    ("energy_head.layer.fp32", DEFAULT): {
        MANY: Launch(num_warps=4, num_stages=4, block_rows=64, block_outputs=32)
    },
    ("energy_head.layer.fp32", "sm_80"): {
        MANY: Launch(num_warps=4, num_stages=3, block_rows=32, block_outputs=32)
    },
    ("energy_head.layer.fp32", "gfx942"): {
        MANY: Launch(num_warps=4, num_stages=2, block_rows=64, block_outputs=32)
    },
    # The width of norm_linear and of its family is the number of rows. Beyond 16, two blocks of 32
    # rows read less through L2 than one of 64, and fill more processors.
    ("norm_linear", DEFAULT): {
        16: Launch(num_warps=4, num_stages=4, block_rows=16, block_outputs=16, block_features=256),
        MANY: Launch(
            num_warps=4, num_stages=4, block_rows=32, block_outputs=32, block_features=128
        ),
    },
    ("norm_linear", "sm_100"): {
        16: Launch(num_warps=4, num_stages=5, block_rows=16, block_outputs=16, block_features=256),
    },
    ("norm_linear", "gfx942"): {
        16: Launch(num_warps=4, num_stages=2, block_rows=16, block_outputs=16, block_features=256),
        MANY: Launch(
            num_warps=4, num_stages=2, block_rows=32, block_outputs=32, block_features=128
        ),
    },
    # A norm also keeps the squares of a step in registers.
    ("norm_linear.norm", DEFAULT): {
        16: Launch(num_warps=4, num_stages=5, block_rows=16, block_outputs=16, block_features=128),
        MANY: Launch(
            num_warps=4, num_stages=4, block_rows=32, block_outputs=32, block_features=128
        ),
    },
    ("norm_linear.norm", "gfx942"): {
        16: Launch(num_warps=4, num_stages=2, block_rows=16, block_outputs=16, block_features=128),
        MANY: Launch(
            num_warps=4, num_stages=2, block_rows=32, block_outputs=32, block_features=128
        ),
    },
    ("norm_linear.fp32", DEFAULT): {
        MANY: Launch(num_warps=4, num_stages=3, block_rows=16, block_outputs=16)
    },
    ("norm_linear.fp32", "gfx942"): {
        MANY: Launch(num_warps=4, num_stages=2, block_rows=16, block_outputs=16)
    },
    # Rows are columns of the cache.
    ("decode_attention", DEFAULT): {
        128: Launch(num_warps=4, num_stages=3, block_rows=64),
        256: Launch(num_warps=4, num_stages=2, block_rows=32),
    },
    ("decode_attention", "gfx942"): {
        128: Launch(num_warps=4, num_stages=2, block_rows=64),
        256: Launch(num_warps=4, num_stages=2, block_rows=32),
    },
    ("decode_attention.fp32", DEFAULT): {
        128: Launch(num_warps=4, num_stages=2, block_rows=32),
        256: Launch(num_warps=4, num_stages=1, block_rows=16),
    },
    # Rows are values, and calls of Philox.
    ("chunk_record", DEFAULT): {MANY: Launch(num_warps=8, block_rows=4096)},
    ("uniform_draws", DEFAULT): {MANY: Launch(num_warps=4, block_rows=256)},
    # Neighbouring logits of a row, a program's.
    ("softmax_draws", DEFAULT): {MANY: Launch(num_warps=4, block_vocab=1024)},
    # The width of linear_argmax is its number of rows: few rows are limited by reading the weight,
    # many by the matmuls, and then a block of 256 tokens reads least from the cache. ".total" also
    # sums exponentials, for which 256 tokens leave too few registers.
    ("linear_argmax", DEFAULT): {
        **_FEW_ARGMAX_ROWS,
        MANY: Launch(num_warps=8, num_stages=3, block_rows=128, fused_width=4096),
    },
    ("linear_argmax", "gfx942"): {
        16: Launch(num_warps=4, num_stages=2, block_rows=16, programs_per_processor=3),
        64: Launch(num_warps=4, num_stages=2, block_rows=64, programs_per_processor=2),
        MANY: Launch(num_warps=8, num_stages=2, block_rows=128, fused_width=4096),
    },
    ("linear_argmax", "sm_90"): {
        **_FEW_ARGMAX_ROWS,
        MANY: Launch(num_warps=8, num_stages=4, block_rows=128, block_vocab=256, fused_width=4096),
    },
    ("linear_argmax.total", "sm_90"): {
        **_FEW_ARGMAX_ROWS,
        MANY: Launch(num_warps=8, num_stages=4, block_rows=128, fused_width=4096),
    },
    ("linear_argmax.fp32", DEFAULT): {
        16: Launch(
            num_warps=4, num_stages=3, block_rows=16, block_vocab=64, programs_per_processor=2
        ),
        MANY: Launch(num_warps=8, num_stages=2, block_rows=64, block_features=32),
    },
    # The width of linear_cross_entropy is the vocabulary. With many warps to a row fewer rows are
    # in work at a time, and the second read of a row comes from the cache.
    ("linear_cross_entropy", DEFAULT): {
        4096: Launch(num_warps=4, features_per_lane=16),
        32768: Launch(num_warps=16, features_per_lane=16),
        MANY: Launch(num_warps=32, features_per_lane=32),
    },
    ("linear_cross_entropy", "gfx942"): {MANY: Launch(num_warps=16, features_per_lane=16)},
}


def architecture(device: torch.device) -> str:
    """Name of a device in the table: ``sm_90``, ``gfx942``, or ``default`` off the GPU."""
    return DEFAULT if device.type != "cuda" else _gpu(_index(device))[0]


def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; off the GPU a few, so that work is split there as well."""
    return 4 if device.type != "cuda" else _gpu(_index(device))[1]


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@cache  # torch takes some microseconds to say what never changes
def _gpu(index: int) -> tuple[str, int]:
    """Architecture and multiprocessors."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        name = properties.gcnArchName.split(":")[0]
    else:
        name = f"sm_{properties.major}{properties.minor}"
    return name, int(properties.multi_processor_count)


def widest(operation: str, arch: str) -> int:
    """Largest width that this architecture has a row of its own for; 0 without one."""
    return max(TABLE.get((operation, arch), {}), default=0)


def warp_size(arch: str) -> int:
    """Lanes of a warp."""
    return 64 if arch.startswith("gfx9") else 32


def setting(operation: str, arch: str, width: int) -> Launch:
    """The table's row for `width` features, of this architecture if it has one of its own."""
    name = operation
    while name:
        for owner in (arch, DEFAULT):
            row = TABLE.get((name, owner), {})
            widths = [most for most in row if most >= width]
            if widths:
                return row[min(widths)]
        name = name.rpartition(".")[0]
    raise ValueError(f"{operation} has no launch setting for width {width}")


def fuses_head(num_rows: int, width: int) -> bool:
    """Whether an energy head without gradients runs as matmuls with the work around them fused in.

    Rows of the weights must start at 16-byte boundaries.
    """
    most = min(FUSED_HEAD_ROWS, FUSED_HEAD_ELEMENTS // width)
    return 0 < num_rows <= most and width % 16 == 0


def fuses_layers(num_rows: int) -> bool:
    """Whether layers without gradients run in `calm_kernels.norm_linear`."""
    return 0 < num_rows <= FUSED_LAYER_ROWS


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
class SampleTile:
    """How the samples of a position lie in registers, and the warps that hold them.

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


@cache
def sample_tile(
    launch: Launch, num_samples: int, width: int, itemsize: int, warp_size: int
) -> SampleTile:
    """Split `width` features over lanes: 16 bytes at a time, at most `features_per_lane` in each.

    In the quadrature a lane multiplies the 1 + 2tσ² of its features, and nodes reach further for
    small widths: fewer features keep that product within float32.
    """
    block = 1 << (width - 1).bit_length()
    most = launch.features_per_lane if width >= 64 else 8 if width >= 8 else 4
    per_lane = min(block, most)
    inner = min(per_lane, 16 // itemsize)
    lanes = block // per_lane
    block_n = min(launch.block_n, 1 << (num_samples - 1).bit_length())
    num_warps = max(1, block_n * lanes // warp_size)
    return SampleTile(per_lane // inner, block_n, lanes, inner, num_warps)
