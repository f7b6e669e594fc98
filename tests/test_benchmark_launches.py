"""Launches of a training and a decode step are those committed; nothing waits, no cast repeats."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

import torch

from benchmarks.decode_steps import CASES, DecodeCase, decode_table
from benchmarks.gpu.decoding import Shape
from benchmarks.launches import DOCUMENT, RESULTS, Launches, faults, section


def test_launches_are_those_committed():
    """In a process of its own, because it takes the kernels away."""
    command = [sys.executable, "-m", "benchmarks.launches", "--check"]
    done = subprocess.run(
        command, cwd=DOCUMENT.parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_has_the_committed_counts():
    assert section(json.loads(RESULTS.read_text())) in DOCUMENT.read_text()


@pytest.mark.parametrize("case", [case for case in CASES if case.model == "CALM-M"][:2], ids=str)
def test_a_decode_step_is_of_few_launches(case):
    """Batch 1, at T = 1 and T = 1/2; five of them a layer."""
    counts = json.loads(RESULTS.read_text())["counts"][case.title]
    assert case.batch_size == 1 and sum(counts.values()) <= 132
    assert counts["layers"] == 5 * Shape().num_layers


def test_the_modelled_time_of_a_decode_step():
    """4.3 MB in 1 µs, 790 M operations in 1 µs, 1.3 µs a launch."""
    shape = Shape(patch_size=4, hidden_size=1, num_layers=1)
    cases = [DecodeCase("CALM-M", 2), DecodeCase("CALM-M", 2, 10), DecodeCase("baseline", 3)]
    assert [case.rows("layers", shape) for case in cases] == [2, 2, 3]
    assert [case.rows("head", shape) for case in cases] == [2, 20, 3]
    assert [case.rows("output layer", shape) for case in cases] == [8, 80, 3]
    # 512 columns of keys and values, of which half are filled, two bytes each, for two sequences
    assert cases[0].cache_bytes(shape, is_whole=True) == 2 * 512 * 2 * 2
    counts, weights = {"layers": 10, "head": 30}, {"layers": 2_150_000, "head": 79 * 10**6}
    *_, layers, head, everything = decode_table(cases[1], counts, weights, shape).splitlines()
    assert layers == "| layers | 352 | 10 | 4.3 | 1.0 | 459 | 14 |"
    assert head == "| head | 30 | 30 | 158.0 | 36.7 | 76 | 76 |"  # its operations: 4 µs
    assert everything == "| **all** | 382 | 40 | 162.3 | 37.7 | 534 | 90 |"


def test_what_is_a_fault():
    weight = torch.ones(3, requires_grad=True)
    launches = Launches(SimpleNamespace(count=0), {"weight": weight})
    launches.watch(module := SimpleNamespace(double=lambda x: x * 2), "double", "doubling")
    with launches:
        result = module.double(weight.to(torch.float64).view(3)).sum()
        result.backward()
    assert launches.counts == {"rest": 4, "doubling": 2}  # two casts, sum, first gradient
    committed = dict(launches.counts)
    assert list(faults("step", launches, committed)) == []
    for name, count in (("doubling", 1), ("doubling", 3), ("rest", 3)):
        (fault,) = faults("step", launches, committed | {name: count})
        assert fault == f"step: {name} launches {launches.counts[name]}, {count} are committed"
    with launches:
        weight.to(torch.float16)
        result.item()
    found = list(faults("step", launches, dict(launches.counts)))
    assert found == [
        "step: the host waits for the device: _local_scalar_dense", "step: weight is cast 2 times",
    ]  # fmt: skip
