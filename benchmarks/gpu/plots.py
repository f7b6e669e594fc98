"""Figures of a campaign: operations over their sizes, decoding, the training step."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.gpu.report import device_name, kernel_rows, rows_of

__all__ = ["draw", "series", "sizes"]

Row = dict[str, Any]
LABELS = {
    "rows": "rows", "num_samples": "samples N", "num_targets": "targets M", "width": "width",
    "batch": "sequences B", "num_candidates": "candidates N", "vocab_size": "vocabulary V",
    "hidden_size": "features H", "distinct": "distinct tokens",
}  # fmt: skip
NEEDED = {"operation", "work", "name", "shape", "median_ms", "peak_memory_bytes"}
QUANTITIES = (("median_ms", "ms", 1.0), ("peak_memory_bytes", "peak memory, MiB", 2.0**20))


def sizes(rows: Sequence[Row]) -> list[str]:
    """Sizes that vary among rows of one work while the others stay as in the first row."""
    return [name for name in LABELS if any(len(p) > 1 for p in series(rows, name).values())]


def series(
    rows: Sequence[Row], size: str, quantity: str = "median_ms"
) -> dict[str, list[tuple[int, float]]]:
    """Points of every implementation over one size, the others as in the first row."""
    lines: dict[str, dict[int, float]] = {}
    reference = rows[0]["shape"]
    for row in rows:
        shape = row["shape"]
        alike = {**shape, size: 0} == {**reference, size: 0}
        if size in shape and alike and row[quantity] > 0:  # axes are logarithmic
            lines.setdefault(row["name"], {}).setdefault(shape[size], row[quantity])
    return {name: sorted(points.items()) for name, points in lines.items()}


def draw(report: dict[str, Any], path: Path) -> list[Path]:
    """Write the figures as ``<path>-<what>.png``; those that had rows."""
    device, written = device_name(report), []
    works: dict[tuple[str, str], list[Row]] = {}
    for row in kernel_rows(report):
        if row.keys() >= NEEDED:
            works.setdefault((row["operation"], row["work"]), []).append(row)
    for (operation, work), rows in works.items():
        if sizes(rows):
            name = "".join(c if c.isalnum() else "-" for c in f"{operation} {work}")
            written.append(path.with_name(f"{path.name}-{name}.png"))
            _draw_sizes(rows, f"{operation}: {work}, {device}", written[-1])
    decoding = [row for row in rows_of(report, "decoding") if "chunk_ms" in row]
    training = [row for row in rows_of(report, "training_step") if "median_ms" in row]
    if decoding or training:
        written.append(path.with_name(f"{path.name}-models.png"))
        _draw_models(decoding, training, device, written[-1])
    return written


def _draw_sizes(rows: Sequence[Row], title: str, path: Path) -> None:
    """A column for each size: milliseconds above, peak memory below."""
    varied = sizes(rows)
    options = {"figsize": (4.5 * len(varied) + 1, 8), "layout": "constrained", "squeeze": False}
    figure, panels = plt.subplots(2, len(varied), **options)
    for column, size in enumerate(varied):
        for panel, (quantity, unit, scale) in zip(panels[:, column], QUANTITIES, strict=True):
            for name, points in series(rows, size, quantity).items():
                places, values = zip(*points, strict=True)
                panel.plot(places, [value / scale for value in values], marker="o", label=name)
            panel.set(xscale="log", yscale="log", xlabel=LABELS[size], ylabel=unit)
            panel.grid(visible=True, which="both", alpha=0.3)
    panels[0, 0].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_models(decoding: Iterable[Row], training: Iterable[Row], device: str, path: Path) -> None:
    """Bars: milliseconds a chunk, milliseconds and memory of a training step."""
    texts = {f"{r['name']}, B {r['batch_size']}, T {r['temperature']:g}": r for r in decoding}
    steps = {row["name"]: row for row in training}
    figure, panels = plt.subplots(1, 3, figsize=(18, 5), layout="constrained")
    shown = (
        (texts, "chunk_ms", "decoding, ms a chunk", 1.0),
        (steps, "median_ms", "training step, ms", 1.0),
        (steps, "peak_memory_bytes", "training step, peak memory, GiB", 2.0**30),
    )
    for panel, (rows, quantity, label, scale) in zip(panels, shown, strict=True):
        panel.barh(list(rows), [(row.get(quantity) or 0) / scale for row in rows.values()])
        panel.set(xlabel=label)
        panel.invert_yaxis()
    figure.suptitle(device)
    figure.savefig(path, dpi=100)
    plt.close(figure)
