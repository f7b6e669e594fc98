"""Number formats that a device computes with in hardware."""

from functools import cache

import torch

__all__ = ["has_bfloat16_units"]

CPU_UNITS = ("avx512_bf16", "amx_bf16")


@cache
def has_bfloat16_units(device: torch.device) -> bool:
    """Whether matmuls in bfloat16 run in hardware on `device`; emulation is slow."""
    if device.type != "cpu":
        return True
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(unit, False) for unit in CPU_UNITS)
