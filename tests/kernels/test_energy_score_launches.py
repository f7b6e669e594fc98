"""How many operations the torch backend needs on a device, where each is a launch.

The meta device takes the same branches as a GPU: everything but the CPU's.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from calm_kernels.energy_score import energy_score, gaussian_energy_score
from calm_kernels.energy_score.quadrature import _nodes

# CALM-M's loss at the reference size: N draws, positions of 4 sequences, M targets, latent size.
N, ROWS, M, WIDTH = 8, 8192, 100, 128
VIEWS = """
view slice select unsqueeze expand transpose permute detach alias as_strided unbind empty split
reshape squeeze t.default
"""


class Launches(TorchDispatchMode):
    """Counts operations that compute, and copies between devices."""

    def __init__(self):
        super().__init__()
        self.count, self.copies = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.removeprefix("aten::")
        if not name.startswith(tuple(VIEWS.split())):
            self.count += 1
        devices = {value.device.type for value in args if isinstance(value, torch.Tensor)}
        if name == "_to_copy" and "cpu" in devices and str(kwargs.get("device")) != "cpu":
            self.copies.append(name)
        return function(*args, **kwargs)


def inputs(*, dtype=torch.float32, width=WIDTH):
    shapes = ((N, ROWS, width), (ROWS, width), (ROWS, width))
    return [torch.zeros(s, device="meta", dtype=dtype, requires_grad=True) for s in shapes]


@pytest.mark.parametrize(
    ("targets", "dtype", "width", "most"),
    [
        ("sample", torch.float32, WIDTH, 500),
        ("antithetic", torch.float32, WIDTH, 500),
        ("analytic", torch.float32, WIDTH, 500),
        ("analytic", torch.float64, WIDTH, 800),
        ("analytic", torch.float32, 2048, 3000),
    ],
)
def test_gaussian_score(targets, dtype, width, most):
    arguments = inputs(dtype=dtype, width=width)
    options = {"targets": targets, "num_targets": M, "backend": "torch"}
    with Launches() as first:
        gaussian_energy_score(*arguments, seed=0, **options).sum().backward()
    assert 20 < first.count <= most
    with Launches() as again:
        gaussian_energy_score(*arguments, seed=0, **options).sum().backward()
    assert again.copies == []


def test_given_targets():
    points = [torch.zeros(n, ROWS, WIDTH, device="meta", requires_grad=True) for n in (N, M)]
    with Launches() as launches:
        energy_score(*points, backend="torch").sum().backward()
    assert 20 < launches.count <= 300


def test_nodes_stay_on_their_device():
    assert _nodes(0.5, torch.float32, torch.device("meta"))[0].device.type == "meta"
    cpu = torch.device("cpu")
    assert _nodes(0.5, torch.float32, cpu)[0] is _nodes(0.5, torch.float32, cpu)[0]
