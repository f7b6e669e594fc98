"""The kernels of the draws: bits of the uniforms, floats of the normals, one launch each."""

import pytest
import torch
from draw_cases import CASES, DRAWS, drawn
from model_cases import Launches
from torch._subclasses.fake_tensor import FakeTensorMode

from calm_kernels import normal_draws, uniform_draws
from calm_kernels.noise import Stream
from calm_kernels.uniform_draws import kernels

# See test_interpreted_noise.py.
NORMAL_TOLERANCE = 2e-6
draws = pytest.mark.parametrize("draw", DRAWS, ids=lambda draw: draw.__name__)


@pytest.mark.parametrize("name", CASES)
def test_uniforms_are_the_same_bits(name):
    actual, expected = uniform_draws, DRAWS[uniform_draws]
    assert torch.equal(drawn(actual, name, backend="triton"), drawn(expected, name))
    options = {"dtype": torch.float64, "stream": Stream.HEAD}
    assert torch.equal(
        drawn(actual, name, backend="triton", **options), drawn(expected, name, **options)
    )


@pytest.mark.parametrize("name", CASES)
def test_normals_are_the_same_floats(name):
    actual, expected = drawn(normal_draws, name, backend="triton"), drawn(normal_draws, name)
    torch.testing.assert_close(actual, expected, rtol=0, atol=NORMAL_TOLERANCE)


@draws
def test_one_launch_whatever_the_address(draw, monkeypatch):
    """A first row that is a number fills no memory."""
    launches = Launches(monkeypatch, kernels)
    monkeypatch.setattr(torch, "full", None)  # which would be a launch more
    for name in CASES:
        drawn(draw, name, backend="triton")
    assert launches.names == [draw.__name__.replace("draws", "kernel")] * len(CASES)


def test_nothing_is_not_launched(monkeypatch):
    launches = Launches(monkeypatch, kernels)
    options = {"stream": Stream.HEAD, "seed": torch.tensor([1, 2]), "backend": "triton"}
    assert uniform_draws(0, 3, **options).shape == (0, 3)
    assert normal_draws(2, 3, num_draws=0, **options).shape == (0, 2, 3)
    assert not launches.names


@draws
def test_one_operator_for_modes(draw):
    """Schema and fake version, by torch's own checker; a mode knows the shape."""
    arguments = (torch.tensor([1, 0]), torch.tensor(2), 0, 3, 5, 2, 1, 6, draw is normal_draws)
    operator = torch.ops.calm_kernels.draws.default
    torch.library.opcheck(
        operator, (*arguments, torch.float32), test_utils=("test_schema", "test_faketensor")
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert drawn(draw, "a seed a row", backend="triton").shape == (2, 3, 64)
