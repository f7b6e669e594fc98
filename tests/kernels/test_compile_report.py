"""Kernels compiled offline: no spills, shared memory and instruction budgets kept; the report
counts right.
"""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from calm_kernels import compile_report
from calm_kernels.backend import OPERATIONS, Backend
from calm_kernels.compiling import inspection
from calm_kernels.compiling.configurations import configurations
from calm_kernels.compiling.targets import TARGETS
from calm_kernels.tuning import setting

CONFIGURATIONS = {found.name: found for found in configurations()}
SERIES = "energy_score.analytic.series"

SASS = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P1 EXIT ;
.L_x_0:
        /*0020*/                   FADD R0, R1, R2 ;
.L_x_1:
        /*0030*/                   FMUL R0, R0, R2 ;
        /*0040*/              @!P2 BRA `(.L_x_1) ;
        /*0050*/                   NOP ;
        /*0060*/               @P0 BRA.U UP0, `(.L_x_0) ;
        /*0070*/              @!P0 BRA `(.L_x_2) ;
.L_x_2:
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   WARPSYNC R3 ;
        /*00a0*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*00b0*/                   BRA `(.L_x_4);
"""
AMDGCN = """
kernel:
\ts_load_dword s0, s[4:5], 0x0
.LBB0_1:
\tv_add_f32 v0, v1, v2
\ts_cbranch_execz .LBB0_1
\ts_nop 1
\ts_cbranch_scc1 .LBB0_1
; %bb.2:
\ts_and_saveexec_b64 s[0:1], vcc
\ts_cbranch_execnz .LBB0_4
.LBB0_3:
\ts_endpgm
.LBB0_4:
\tglobal_store_dword v0, v1, s[0:1]
\ts_branch .LBB0_3
"""


def test_nested_loops_of_sass():
    names, loops = inspection.parse_sass(SASS)
    assert names[-1] == "EXIT" and len(names) == 9  # what follows the exit is a slow path
    assert [(loop.first, loop.last) for loop in loops] == [(2, 6), (3, 4)]
    # 2 before, 4 trips of (FADD + 3 x 2 + branch; NOP is free), 2 after
    assert inspection.count_instructions(names, loops, (4, 3)) == 2 + 4 * (1 + 3 * 2 + 1) + 2
    assert inspection.count_instructions(names, loops, (1, 0)) == 2 + 2 + 2


def test_loops_of_amd_assembly():
    names, loops = inspection.parse_amdgcn(AMDGCN)
    assert [(loop.first, loop.last) for loop in loops] == [
        (1, 4)
    ]  # two ways back are one loop, a jump to the exit is none
    assert inspection.count_instructions(names, loops, (10,)) == 1 + 10 * 3 + 3


def test_two_loops_that_have_become_one():
    """FADD begins a pass of the outer loop, or is jumped over; FMUL runs in every step."""
    listing = SASS.replace(".L_x_1:", ".L_x_9:").replace("@!P2 BRA `(.L_x_1)", "@!P2 BRA `(.L_x_0)")
    skip = "        /*0018*/               @P3 BRA `(.L_x_9) ;\n"
    listing = listing.replace("        /*0020*/", skip + "        /*0020*/")
    names, loops = inspection.parse_sass(listing)
    assert loops == [inspection.Loop(2, 7)] and loops[0].optional == {3}
    assert inspection.count_instructions(names, loops, (12,)) == 2 + 12 * 5 + 2
    flattened = inspection.Flattened(3, 4)
    assert inspection.count_instructions(names, loops, (flattened,)) == 2 + 12 * 4 + 3 + 2


def test_loops_that_were_not_declared():
    names, loops = inspection.parse_sass(SASS)
    with pytest.raises(ValueError, match="2 loops in the code, 1 declared"):
        inspection.count_instructions(names, loops, (4,))


def test_a_block_that_is_jumped_over_is_no_loop():
    listing = AMDGCN.replace("\ts_nop 1\n", "\ts_branch .LBB0_3\n")
    assert inspection.parse_amdgcn(AMDGCN)[1] == [inspection.Loop(1, 4)]
    assert inspection.parse_amdgcn(listing)[1] == [inspection.Loop(1, 2)]


def test_loops_that_may_be_unrolled():
    names, loops = ["A", "B"], [inspection.Loop(1, 1)]
    fixed = inspection.Fixed(8)
    assert inspection.count_instructions(names, loops, (3,)) == 1 + 3
    assert inspection.count_instructions(names, loops, (3, fixed)) == 1 + 3
    assert inspection.count_instructions(names, loops, (fixed,)) == 1 + 8
    assert inspection.count_instructions(names, [], (fixed,)) == 2
    with pytest.raises(ValueError, match="1 loops in the code, 3 declared, 2 if unrolled"):
        inspection.count_instructions(names, loops, (3, 4, fixed))


@pytest.mark.parametrize("name", [name for name, case in CONFIGURATIONS.items() if case.is_main])
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_main_configurations(target, name):
    """`make compile-report` compiles all of them for all targets."""
    row = compile_report.measure(CONFIGURATIONS[name], TARGETS[target])
    assert not row.problems
    assert row.registers > 0 and row.instructions > 0


def test_many_rows_stream_through_all_stages():
    """Each stage has shared memory of its own where the compiler found one loop to pipeline."""
    row = compile_report.measure(CONFIGURATIONS["linear_argmax.R800"], TARGETS["sm_90"])
    launch = setting("linear_argmax", "sm_90", 800)
    stage_bytes = 2 * launch.block_features * (launch.block_rows + launch.block_vocab)
    assert row.shared_bytes == launch.num_stages * stage_bytes


def test_every_operation_with_kernels_has_cases():
    fused = {name for name, backends in OPERATIONS.items() if Backend.TRITON in backends}
    covered = {name.split(".")[0] for name in CONFIGURATIONS}
    # Which share the folders of energy_score and chunk_record.
    assert covered == fused - {"gaussian_energy_score", "advance_state"}
    assert {name.split(".")[0] for name, case in CONFIGURATIONS.items() if case.is_main} == covered


def test_the_table_and_its_exit_status(capsys):
    assert compile_report.main(["--target", "sm_90", "--op", SERIES + ".L1024"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[1:]] == [SERIES + ".L1024", SERIES + ".L1024.fp32"]
    assert compile_report.main(["--target", "sm_90", "--op", SERIES, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["configuration"] for row in rows][:2] == [SERIES, SERIES + ".L1024"]
    assert rows[0]["spilled_bytes"] == 0 and rows[0]["instructions"] <= rows[0]["budget"]


def test_a_form_is_compiled_where_it_is_launched():
    name = "energy_score.drawn.sample.L1024"
    assert [row.target for row in compile_report.report(["sm_90", "gfx942"], name)] == ["sm_90"]


def test_a_broken_budget_fails(monkeypatch, capsys):
    mean = replace(CONFIGURATIONS[SERIES], budget=100)
    monkeypatch.setattr(compile_report, "configurations", lambda: iter([mean]))
    assert compile_report.main(["--target", "sm_90"]) == 1
    assert "instructions > budget 100" in capsys.readouterr().out


def test_a_missing_instruction_fails():
    series = replace(CONFIGURATIONS[SERIES], needed={"sm_90": "HGMMA"})
    assert compile_report.measure(series, TARGETS["sm_90"]).problems == ("no HGMMA instruction",)
    assert not compile_report.measure(
        replace(series, needed={"sm_90": "FFMA"}), TARGETS["sm_90"]
    ).problems


def test_spills_and_shared_memory_fail():
    row = compile_report.measure(
        CONFIGURATIONS[SERIES], replace(TARGETS["sm_90"], shared_limit=16, budget_scale=0.1)
    )
    assert len(row.problems) == 2
    # One warp for 1024 dimensions cannot hold a patch in registers.
    wide = CONFIGURATIONS[SERIES + ".L1024"]

    def starved(target):
        constants, options = wide.constants(target)
        return constants, options | {"num_warps": 2}

    row = compile_report.measure(replace(wide, constants=starved), TARGETS["sm_90"])
    assert row.spilled_bytes > 0 and "spills" in row.problems[0]


def test_bad_arguments(capsys, monkeypatch):
    for arguments in (["--op", "layernorm"], ["--target", "sm_20"]):
        with pytest.raises(SystemExit):
            compile_report.main(arguments)
    assert "no configuration starts with 'layernorm'" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        compile_report.main([])
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err


def test_cpu_tensors_are_refused_outside_the_interpreter():
    from calm_kernels import energy_score, gaussian_energy_score, reparameterize

    mean = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"tensors on a GPU, got cpu.*TRITON_INTERPRET"):
        gaussian_energy_score(torch.zeros(3, 2, 8), mean, mean, backend="triton")
    with pytest.raises(ValueError, match=r"tensors on a GPU, got cpu"):
        energy_score(torch.zeros(3, 2, 8), torch.zeros(2, 2, 8), backend="triton")
    with pytest.raises(ValueError, match=r"tensors on a GPU, got cpu"):
        reparameterize(mean, kl_floor=0.0, backend="triton")
