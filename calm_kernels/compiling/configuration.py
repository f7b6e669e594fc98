"""One compiled form of a kernel: what a launch would compile, and what is expected of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.compiler import ASTSource

from calm_kernels.compiling.targets import Target
from calm_kernels.tuning import Constants

__all__ = ["Configuration", "compile_kernel"]

_NAMES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
}  # fmt: skip


@dataclass(frozen=True)
class Configuration:
    """A kernel with the constants of a launch, the specialisations that Triton derives from aligned
    tensors and contiguous memory, and the work of the reference size.

    Run-time arguments are pointers to `dtype` if their name ends in ``_ptr``, else 32-bit integers,
    unless `types` says otherwise.
    """

    name: str  # operation.form; `--op` selects by its beginning
    kernel: Any
    dtype: torch.dtype
    constants: Callable[[Target], Constants]
    # Of each loop, in the order of the code. None where loops cannot be told from branches, as in
    # the pipelined code of AMD's compiler: instructions are then counted once.
    trips: Callable[[dict[str, Any]], tuple[int, ...] | None]
    bytes_per_row: float  # traffic that cannot be avoided
    rows: int = 8192  # positions, at the reference size
    programs: Callable[[dict[str, Any]], float] | None = None  # of the launch; default: one a row
    flops_per_row: float = 0.0  # of matmuls on tensor cores
    budget: int | None = None  # warp instructions a row, with NVIDIA's special functions
    types: Mapping[str, str] = field(default_factory=dict)  # Triton's: "*i64", "fp32", "i64", ...
    ones: tuple[str, ...] = ()  # arguments that are 1: strides of contiguous axes
    aligned: tuple[str, ...] = ()  # integers that are multiples of 16; pointers always are
    needed: Mapping[str, str] = field(default_factory=dict)  # target -> an instruction, as HGMMA
    targets: tuple[str, ...] = ()  # that launch this form; none means all
    is_main: bool = False  # compiled by the tests, too

    def num_programs(self, constants: dict[str, Any]) -> float:
        """Programs of the launch."""
        return self.rows if self.programs is None else self.programs(constants)

    def type_of(self, name: str) -> str:
        """Triton's type of a run-time argument."""
        if name in self.types:
            return self.types[name]
        return f"*{_NAMES[self.dtype]}" if name.endswith("_ptr") else "i32"


def compile_kernel(configuration: Configuration, target: Target) -> tuple[Any, dict[str, Any]]:
    """The compiled kernel and its constants."""
    constants, options = configuration.constants(target)
    names = configuration.kernel.arg_names
    fixed = {name: 1 for name in names if name in configuration.ones} | constants
    signature = {
        name: "constexpr" if name in fixed else configuration.type_of(name) for name in names
    }
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or (name in configuration.aligned and name not in fixed)
    }
    values = {(names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(configuration.kernel, signature, constexprs=values, attrs=aligned)
    return triton.compile(source, target=target.gpu(), options=options), constants
