"""The works of the GPU benchmark, each run once on tiny shapes; what a graph is to capture never
waits for the device.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu import (
    agreeing_patch,
    energy_head,
    energy_score,
    linear_argmax,
    linear_cross_entropy,
    reparameterize,
)
from calm_kernels.energy_score import pairs
from calm_kernels.linear_cross_entropy import api

# Operators that read from the device, or copy to it from ordinary memory.
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::lift_fresh"}
SHAPES = {
    "energy_score": (energy_score, energy_score.Shape(3, 2, 4, 64)),
    "quadrature": (energy_score, energy_score.Shape(2, 3, 4, 32, 1.5)),
    "agreeing_patch": (agreeing_patch, agreeing_patch.Shape(3, 9, 2, 2)),
    "linear_argmax": (linear_argmax, linear_argmax.Shape(5, 40, 8)),
    "linear_cross_entropy": (linear_cross_entropy, linear_cross_entropy.Shape(6, 40, 8)),
    "energy_head": (energy_head, energy_head.Shape(4, 2, 16, 4, 4, 2)),
    "energy_head-decode": (energy_head, energy_head.Shape(4, 2, 16, 4, 4, 2, is_training=False)),
    "reparameterize": (reparameterize, reparameterize.Shape(3, 16)),
}


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


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated"
)  # torch.compile's imports
@pytest.mark.parametrize("name", SHAPES)
def test_works(name, as_on_a_gpu):
    torch.manual_seed(0)
    module, shape = SHAPES[name]
    seen = []
    for work in module.works([shape], device="cpu"):
        seen.append((work.label, work.name))
        assert work.buffers >= 2 and work.traffic > 0
        if "torch.compile" in work.name:
            continue  # needs a C++ compiler
        with Waits() as waits:
            result = work.run(work.buffers - 1)
        results = result if isinstance(result, (tuple, list)) else [result]
        assert all(torch.isfinite(value).all() for value in results)
        assert not (work.can_capture and waits.found), (work.name, waits.found)
    assert len(seen) == len(set(seen)) > 2
