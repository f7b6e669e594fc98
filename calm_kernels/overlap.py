"""Kernels of a decode step that come to the processors before the kernel ahead of them has ended.

A GPU begins a kernel once the one before it has ended. With programmatic dependent launch (NVIDIA,
from Hopper on) it begins when every program of the one before it runs, and waits on the device. So
the work of starting it is hidden. One rule makes this safe: the first statement of a kernel that
is launched so is `wait_for_previous`, before it reads or writes anything. It then ends after the
kernel before it has ended, so that one wait is enough for all that ran before; kernels of other
libraries may stand between, which wait as ever. Off by default: nothing here was timed on a GPU.
"""

from typing import Any

import triton
import triton.language as tl

from calm_kernels.backend import is_interpreted, wants_overlap
from calm_kernels.tuning import Constants

__all__ = ["overlapped", "overlaps_launches", "wait_for_previous"]

_HOPPER = 90


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Wait for the end of the kernel before this one, whose writes are then seen, and let programs
    of the next one come.

    A wait inside a loop would not do: loads of a pipelined loop are moved ahead of it.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def overlaps_launches(arch: str) -> bool:
    """Whether launches on this architecture overlap: where it can and the user asked for it."""
    if not (arch.startswith("sm_") and wants_overlap()):
        return False
    return int(arch[3:]) >= _HOPPER and not is_interpreted()


def overlapped(constants: dict[str, Any], options: dict[str, Any], arch: str) -> Constants:
    """Constants and options of a kernel that begins with ``wait_for_previous(OVERLAP)``.

    The constant and the launch option always go together: without the wait the option is a race.
    """
    overlaps = overlaps_launches(arch)
    if overlaps:
        options = options | {"launch_pdl": True}
    return constants | {"OVERLAP": overlaps}, options
