"""Launches of a training and a decode step are those committed; nothing waits, no cast repeats."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

import torch

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
