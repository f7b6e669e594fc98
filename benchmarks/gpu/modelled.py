"""Times that this repository quotes without a measurement, each with the row that measures it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.tables import table

__all__ = ["MODELLED", "Modelled", "modelled_table"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Modelled:
    """A time as its page quotes it, for an H200.

    Attributes:
        operation: whose README quotes it.
        what: what is timed.
        quoted: milliseconds or microseconds, as they stand there.
        work: the label of the measured row.
        name: the implementation of the row.
        shape: sizes of the row; others are free.
        beyond: an implementation whose time is taken off.
    """

    operation: str
    what: str
    quoted: str
    work: str
    name: str
    shape: dict[str, Any]
    beyond: str = ""

    def measured(self, rows: Sequence[Row]) -> str:
        """The median time in the unit of the quoted one; "not measured" without a row."""
        time = self._milliseconds(rows, self.name)
        less = self._milliseconds(rows, self.beyond) if self.beyond else 0.0
        if time is None or less is None:
            return "not measured"
        unit = self.quoted.split()[-1]
        return f"{(time - less) * (1e3 if unit == 'µs' else 1.0):.1f} {unit}"

    def _milliseconds(self, rows: Iterable[Row], name: str) -> float | None:
        wanted = (self.operation, self.work, name)
        for row in rows:
            shape = row.get("shape") or {}
            if (row.get("operation"), row.get("work"), row.get("name")) == wanted and all(
                shape.get(key) == size for key, size in self.shape.items()
            ):
                return row.get("median_ms")
        return None


def _head(width: int, quoted: str, recompute: str) -> Iterable[Modelled]:
    shape = {"rows": 8192, "num_samples": 8, "width": width}
    run, sizes = "forward + backward", f"8192 chunks, N = 8, C = {width}"
    yield Modelled("energy_head", f"{sizes}, both passes", quoted, run, "triton", shape)
    yield Modelled(
        "energy_head", f"{sizes}, `recompute` adds", recompute, run, "triton, recompute", shape,
        beyond="triton",
    )  # fmt: skip


def _decode(width: int, quoted: str, published: str) -> Iterable[Modelled]:
    shape = {"rows": 1, "num_samples": 200, "width": width, "is_training": False}
    what = f"200 draws of a chunk, C = {width}"
    yield Modelled("energy_head", what, quoted, "forward", "triton", shape)
    yield Modelled(
        "energy_head", f"{what}, published module", published, "forward", "published module", shape
    )


def _score(what: str, quoted: str, targets: str, spread: float) -> Modelled:
    shape = {"rows": 8192, "num_samples": 8, "num_targets": 100, "width": 128, "spread": spread}
    name = f"triton, {targets}"
    return Modelled("energy_score", what, quoted, "gaussian, forward + gradient", name, shape)


def _argmax(rows: int, kind: str, quoted: str) -> Modelled:
    shape = {"rows": rows, "vocab_size": 128_256, "hidden_size": 512}
    what = f"{rows} rows, V = 128,256, H = 512, {kind}"
    return Modelled("linear_argmax", what, quoted, "forward", "triton", shape)


MODELLED = [
    _score("8192 chunks, analytic, series, issue", "21 µs", "analytic", 0.2),
    _score("8192 chunks, analytic, quadrature, issue", "70 µs", "analytic", 1.5),
    _score("8192 chunks, antithetic, M = 100, issue", "73 µs", "antithetic", 0.2),
    _score("8192 chunks, sampled, M = 100, issue", "106 µs", "sample", 0.2),
    *_head(1024, "16.3 ms", "3.9 ms"),
    *_head(1536, "32.9 ms", "8.1 ms"),
    *_head(2560, "83.0 ms", "20.9 ms"),
    *_decode(768, "47 µs", "115 µs"),
    *_decode(1024, "53 µs", "121 µs"),
    *_decode(2560, "120 µs", "188 µs"),
    _argmax(4, "floor", "30.5 µs"),
    _argmax(800, "floor", "133 µs"),
    _argmax(800, "reads through L2", "196 µs"),
    Modelled(
        "linear_cross_entropy", "32,768 rows, V = 128,256, H = 512, matmuls alone", "16.3 ms",
        "forward + gradients", "triton",
        {"rows": 32_768, "vocab_size": 128_256, "hidden_size": 512},
    ),
]  # fmt: skip


def modelled_table(rows: Sequence[Row]) -> str:
    """Every modelled time beside its measurement among `rows`, of any stage."""
    return table(
        ("operation", "what", "modelled", "measured"),
        [(each.operation, each.what, each.quoted, each.measured(rows)) for each in MODELLED],
    )
