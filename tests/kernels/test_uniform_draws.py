"""Addressed draws of every backend: those of `calm_kernels.noise`, and a literal constant."""

import pytest
import torch
from draw_cases import CASES, DRAWS, drawn

from calm_kernels import normal_draws, uniform_draws
from calm_kernels.backend import use_backend
from calm_kernels.noise import Stream
from calm_kernels.uniform_draws import api

draws = pytest.mark.parametrize("draw", DRAWS, ids=lambda draw: draw.__name__)


@draws
@pytest.mark.parametrize("name", CASES)
def test_same_draws(draw, name, backend):
    actual, expected = (drawn(f, name) for f in (draw, DRAWS[draw]))
    with use_backend(backend):
        actual = drawn(draw, name)
    assert actual.shape == expected.shape and actual.dtype == torch.float32
    if draw is uniform_draws or backend == "torch":
        assert torch.equal(actual, expected)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)


def test_published_words(backend):
    """Random123, tests/kat_vectors, philox4x32 10: key and counter of zeros."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    actual = uniform_draws(1, 4, stream=0, seed=0, dtype=torch.float64, backend=backend)
    assert (actual[0] * 2**24).tolist() == [word >> 8 for word in words]


@draws
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtypes_and_nothing(draw, dtype, backend):
    single = drawn(draw, "a seed a row", backend=backend)
    actual = drawn(draw, "a seed a row", dtype=dtype, backend=backend)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, single.to(dtype), rtol=0, atol=1e-6)
    options = {"stream": Stream.HEAD, "seed": 1, "backend": backend}
    assert draw(0, 5, num_draws=2, **options).shape == (2, 0, 5)
    assert draw(3, 5, num_draws=0, **options).shape == (0, 3, 5)


@draws
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_rows": -1}, ValueError, "num_rows must be at least 0"),
        ({"width": 0}, ValueError, "width must be at least 1"),
        ({"num_draws": 1.5}, TypeError, "num_draws must be an integer"),
        ({"first_draw": -1}, ValueError, "first_draw must be at least 0"),
        ({"first_row": 0.5}, TypeError, "first_row must be an integer, got float"),
        (
            {"first_row": 2**63},
            ValueError,
            "first_row must fit into 64 bits, got 9223372036854775808",
        ),
        ({"first_row": torch.tensor(True)}, TypeError, r"first_row must .*, got torch.bool of"),
        ({"first_row": torch.tensor(1j)}, TypeError, r"one integer, got torch.complex64 of"),
        ({"first_row": torch.ones(2, dtype=torch.int64)}, TypeError, r"one integer, .*\(2,\)"),
        ({"dtype": torch.int64}, TypeError, "dtype must be a floating one, got torch.int64"),
        ({"seed": torch.zeros(4, dtype=torch.int64)}, ValueError, "seed has 4 rows for 7"),
    ],
)
def test_bad_input(draw, options, error, message, backend):
    sizes = {"num_rows": 7, "width": 3, "stream": Stream.HEAD, "seed": 5, "backend": backend}
    with pytest.raises(error, match=message):
        draw(**sizes | options)


def test_more_than_a_kernel_counts(monkeypatch):
    monkeypatch.setattr(api, "MAX_ELEMENTS", 11)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=r"normal_draws: .* draws at most 11 numbers at a time"):
        normal_draws(3, 4, stream=Stream.HEAD, seed=1, backend="triton")
    assert normal_draws(3, 4, stream=Stream.HEAD, seed=1).shape == (3, 4)
