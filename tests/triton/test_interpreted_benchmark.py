"""The works of the GPU benchmark, each run once on tiny shapes; what a graph is to capture never
waits for the device.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu import counters
from benchmarks.gpu.run import operations
from calm_kernels.energy_score import pairs
from calm_kernels.linear_cross_entropy import api

# Operators that read from the device, or copy to it from ordinary memory.
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::lift_fresh"}
# of torch.compile's imports
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
WORKS = [
    (name, number) for name, module in operations().items() for number in range(len(module.TINY))
]


class Waits(TorchDispatchMode):
    """Records the operators that would make a GPU wait."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in WAITS:
            self.found.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Leaves out what the torch backend does on a CPU alone, where nobody waits."""
    monkeypatch.setattr(api, "_check_range", lambda *labels: None)
    monkeypatch.setattr(pairs, "MIN_MATMUL_WIDTH", 2**62)


@pytest.mark.parametrize(("name", "number"), WORKS)
def test_works(name, number, as_on_a_gpu):
    torch.manual_seed(0)
    module, seen = operations()[name], []
    for work in module.works(module.TINY[number:][:1], device="cpu"):
        seen.append((work.label, work.name))
        assert work.buffers >= 2 and work.traffic > 0
        if work.missing:
            continue
        with Waits() as waits:
            result = work.run(work.buffers - 1)
        results = result if isinstance(result, (tuple, list)) else [result]
        assert all(torch.isfinite(value).all() for value in results)
        assert not (work.can_capture and waits.found), (work.name, waits.found)
    assert len(seen) == len(set(seen)) > 2


@pytest.mark.parametrize("name", operations())
def test_compiled_baselines(name):
    """As they are before a compiler has seen them; there is one of everything but a host's loop."""
    shapes = operations()[name].TINY[:1]
    with torch.compiler.set_stance("force_eager"):
        found = list(operations()[name].works(shapes, "cpu", compiled=True))
        for work in found:
            work.run(0)
    compiled = ["torch.compile" in work.name for work in found]
    assert any(compiled) is (name != "agreeing_patch")


@pytest.mark.parametrize("name", counters.CASES)
def test_what_is_profiled(name, monkeypatch):
    """The kernel under the profiler is ours, once before the call that counts."""
    runs = []

    def works(shapes, device):
        for name in ("torch", "triton", "triton, analytic"):
            yield SimpleNamespace(name=name, run=lambda index, name=name: runs.append(name))

    for module in operations().values():
        monkeypatch.setattr(module, "works", works)
    counters.run_case(name, "cpu")
    assert runs == [counters.CASES[name][1]]


def test_sizes_of_what_is_profiled():
    for operation, _, sizes in counters.CASES.values():
        assert operations()[operation].Shape(**sizes)
