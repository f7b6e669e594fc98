"""The machines that kernels are compiled for, and the rates that turn counts into time."""

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

__all__ = ["TARGETS", "Target"]


@dataclass(frozen=True)
class Target:
    """One machine: what the compiler needs, the limits that a kernel must keep, and its rates."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int  # bytes a program may use
    issue_rate: float  # warp instructions a second, all schedulers busy
    bandwidth: float  # bytes a second that a copy reaches
    tensor_rate: float  # bf16 operations a second that a large matmul reaches
    budget_scale: float = 1.0  # instruction budgets are for NVIDIA's special functions

    @property
    def is_nvidia(self) -> bool:
        """Whether kernels may use NVIDIA's special-function instructions."""
        return self.backend == "cuda"

    def gpu(self) -> GPUTarget:
        """As Triton names it."""
        return GPUTarget(self.backend, self.arch, self.warp_size)


# A100, H200, B200 and MI300X: processors x schedulers x clock; copies and matmuls measured at
# 60 to 85 % of peak.
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 << 10, 108 * 4 * 1.41e9, 1.7e12, 0.25e15),
        Target("sm_90", "cuda", 90, 32, 227 << 10, 132 * 4 * 1.755e9, 4.3e12, 0.79e15),
        Target("sm_100", "cuda", 100, 32, 227 << 10, 148 * 4 * 1.85e9, 6.8e12, 1.7e15),
        Target("gfx942", "hip", "gfx942", 64, 64 << 10, 304 * 2.1e9, 4.2e12, 0.75e15, 1.35),
    )
}
