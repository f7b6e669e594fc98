"""Time and memory of the energy score over chunks, samples, targets and dimensions."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["draw", "series"]

AXES = {
    "rows": "chunks",
    "num_samples": "samples N",
    "num_targets": "targets M",
    "width": "latent size L",
}
REFERENCE = {"rows": 8192, "num_samples": 8, "num_targets": 100, "width": 128, "spread": 0.2}
WORK = "gaussian, forward + gradient"


def series(results: dict, axis: str, quantity: str) -> dict[str, list[tuple[int, float]]]:
    """Points of every implementation along one axis, the other sizes at their reference."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in results["rows"]:
        shape = row["shape"]
        if "error" in row or (row["operation"], row["work"]) != ("energy_score", WORK):
            continue
        others = {name: size for name, size in REFERENCE.items() if name != axis}
        if axis in shape and all(shape.get(name) == size for name, size in others.items()):
            lines.setdefault(row["name"], []).append((shape[axis], row[quantity]))
    return {name: sorted(points) for name, points in lines.items()}


def draw(results: dict, path: Path) -> None:
    """Two rows of four panels: milliseconds above, peak memory below."""
    figure, panels = plt.subplots(2, 4, figsize=(18, 8), layout="constrained")
    for column, (axis, label) in enumerate(AXES.items()):
        for row, (quantity, unit, scale) in enumerate(
            (("median_ms", "ms", 1.0), ("peak_memory_bytes", "peak memory, MiB", 2.0**20))
        ):
            panel = panels[row][column]
            for name, points in series(results, axis, quantity).items():
                sizes, values = zip(*points, strict=True)
                panel.plot(sizes, [value / scale for value in values], marker="o", label=name)
            panel.set(xscale="log", yscale="log", xlabel=label, ylabel=unit)
            panel.grid(visible=True, which="both", alpha=0.3)
    panels[0][0].legend(fontsize="small")
    figure.suptitle(f"Energy score, forward + gradient, {results['environment']['device']}")
    figure.savefig(path, dpi=120)
    plt.close(figure)
