"""Launches that overlap: when they do, that each kernel waits first, that no other is affected."""

import ast
import inspect

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from calm_kernels import compile_report
from calm_kernels.backend import use_overlap, wants_overlap
from calm_kernels.compiling.configuration import Configuration
from calm_kernels.compiling.configurations import configurations
from calm_kernels.compiling.inspection import waits_first
from calm_kernels.compiling.targets import TARGETS
from calm_kernels.overlap import overlapped, overlaps_launches, wait_for_previous
from calm_kernels.tuning import Launch, launch_options

CASES = {case.name: case for case in configurations() if "OVERLAP" in case.kernel.arg_names}
QUICK = ["chunk_record.advance", "uniform_draws.token", "linear_argmax.reduce.R4"]
RACE = "memory is accessed before the wait for the previous kernel"


@pytest.fixture(autouse=True)
def nothing_is_chosen(monkeypatch):
    monkeypatch.delenv("CALM_KERNELS_OVERLAP", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_off_unless_asked_for(monkeypatch):
    assert not wants_overlap() and not overlaps_launches("sm_90")
    monkeypatch.setenv("CALM_KERNELS_OVERLAP", "1")
    assert wants_overlap() and overlaps_launches("sm_90")
    with use_overlap(False):
        assert not overlaps_launches("sm_90")
    monkeypatch.setenv("CALM_KERNELS_OVERLAP", "0")
    with pytest.raises(RuntimeError), use_overlap(True):
        assert overlaps_launches("sm_90")
        raise RuntimeError
    assert not wants_overlap()
    monkeypatch.setenv("CALM_KERNELS_OVERLAP", "yes")
    with pytest.raises(ValueError, match="CALM_KERNELS_OVERLAP must be 0 or 1, got 'yes'"):
        wants_overlap()


@pytest.mark.parametrize(
    ("arch", "can"),
    [("sm_80", False), ("sm_89", False), ("sm_90", True), ("sm_100", True), ("sm_120", True),
     ("gfx942", False), ("default", False)],
)  # fmt: skip
def test_where_a_gpu_can(arch, can, monkeypatch):
    """The constant and the launch option go together; AMD's compiler does not know the option."""
    with use_overlap(True):
        constants, options = overlapped({"SIZE": 4}, {"num_warps": 2}, arch)
        assert constants == {"SIZE": 4, "OVERLAP": can}
        assert options == {"num_warps": 2} | ({"launch_pdl": True} if can else {})
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert not overlaps_launches(arch)


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long)
             for name, case in CASES.items() if name in QUICK or case.is_main],
)  # fmt: skip
def test_kernels_wait_before_they_access_memory(name, target):
    """And they spill nothing, within the budgets of kernels that do not wait."""
    with use_overlap(True):
        row = compile_report.measure(CASES[name], TARGETS[target])
    assert not row.problems


def test_the_first_statement_of_each_kernel_is_the_wait():
    """Of all kernels, in their source; the machine code of most is read by `make test-long`."""
    for kernel in {case.kernel for case in CASES.values()}:
        function = ast.parse(inspect.getsource(kernel.fn)).body[0]
        first = function.body[1 if ast.get_docstring(function) else 0]
        assert ast.unparse(first) == "wait_for_previous(OVERLAP)", function.name


def test_every_overlapping_kernel_is_compiled():
    compiled = {case.kernel for name, case in CASES.items() if name in QUICK or case.is_main}
    assert compiled == {case.kernel for case in CASES.values()}


@triton.jit
def _late_kernel(x_ptr, OVERLAP: tl.constexpr):
    value = tl.load(x_ptr)
    wait_for_previous(OVERLAP)
    tl.store(x_ptr, value + 1)


@triton.jit
def _careless_kernel(x_ptr, OVERLAP: tl.constexpr):
    tl.store(x_ptr, tl.load(x_ptr) + 1)


@pytest.mark.parametrize("kernel", [_late_kernel, _careless_kernel], ids=["late", "never"])
def test_a_kernel_that_does_not_wait_first_is_found(kernel):
    case = Configuration(
        name="race", kernel=kernel, dtype=torch.float32, trips=lambda _: (), bytes_per_row=8,
        constants=lambda target: overlapped({}, launch_options(Launch()), target.name), rows=1,
    )  # fmt: skip
    assert compile_report.measure(case, TARGETS["sm_90"]).problems == ()
    with use_overlap(True):
        assert compile_report.measure(case, TARGETS["sm_90"]).problems == (RACE,)


def _listing(*lines):
    """A disassembly; a line that ends with a colon is a label."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * place:04x}*/     {line} ;"
        for place, line in enumerate(lines)
    )


def test_what_waits_first():
    load, leave = "LDG.E R2, desc[UR4][R2.64]", "EXIT"
    assert waits_first(_listing("LDC R1, c[0x0][0x28]", "ACQBULK", load, leave))
    assert not waits_first(_listing(load, "ACQBULK", leave))
    assert not waits_first(_listing("@!P0 STG.E desc[UR4][R2.64], R3", "ACQBULK", leave))
    assert not waits_first(_listing("LDC R1, c[0x0][0x28]", load, leave))
    assert not waits_first(_listing("@P0 EXIT", "ACQBULK", load, leave))
    assert not waits_first(_listing("ACQBULK", "LDG.E.CONSTANT R2, desc[UR4][R2.64]", leave))


def test_only_shared_memory_is_accessed_ahead_of_the_wait():
    """As where tensor memory is allocated: a jump over it, which leads to the wait."""
    ahead = (
        "@P0 BRA `(.L_x_0)",
        "ATOMS.OR RZ, [UR6], R3",
        "STS [UR7], R2",
        "LDCU UR4, c[0x0][0x3]",
    )
    assert waits_first(_listing(*ahead, ".L_x_0:", "LDS R2, [UR7]", "ACQBULK", "EXIT"))
    assert not waits_first(_listing(*ahead, "ACQBULK", ".L_x_0:", "EXIT"))
