"""The GPU benchmark as far as a CPU can run it: shapes, series, plots, refusal without a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import plots, run


def results():
    """Made-up rows of two implementations over every sweep."""
    rows = [
        {"name": name, "shape": run.asdict(shape), "median_ms": 0.1 * factor, "peak_memory_bytes": 1
        << 20} for name, factor in (("triton, analytic", 1), ("torch, analytic", 5)) for sweep in
        run.SWEEPS.values() for shape in sweep
    ]  # fmt: skip
    return {"environment": {"device": "a device"}, "rows": rows}


def test_series_follow_one_axis():
    found = plots.series(results(), "num_samples", "median_ms")
    sizes = [size for size, _ in found["triton, analytic"]]
    assert sizes[0] == 2 and sizes[-1] == 16 and sizes == sorted(sizes)


def test_plots_are_drawn(tmp_path):
    plots.draw(results(), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_traffic_of_the_reference_shape():
    assert run.REFERENCE.traffic() == 8192 * 128 * 2 * 18
    assert run.REFERENCE.eager_bytes() == 3_355_443_200


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert run.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err
