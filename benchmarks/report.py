"""Tables from saved results: ``python benchmarks/report.py FILE [FILE ...] [--readme README.md]``.

The files are those of `make bench ARGS=--benchmark-json=FILE`, those of `benchmarks.published`, or
the ``report.json`` of a GPU campaign. Where several runs are given, the table quotes the range over
them, never the best; campaigns stand for themselves. No number in a page is typed by hand: this
script writes the tables between their markers. Those of a campaign, and its figures, go to
benchmarks/results/ as well.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if not __package__:  # started as a file, not as a module
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu import report as campaign
from benchmarks.tables import emphasised, fill, span, table, write_between

__all__ = ["main", "markdown_table", "published_table", "requirement_lines"]

RESULTS = Path(__file__).resolve().parent / "results"
MEBIBYTE = 2**20
Results = dict
Row = tuple[str, str]  # work, baseline


def read_rows(results: Results) -> dict[Row, dict]:
    """Measurements of one `make bench` by work and baseline."""
    rows = {}
    for entry in results["benchmarks"]:
        info = entry.get("extra_info", {})
        for name, baseline in info.get("baselines", {}).items():
            rows[entry["group"], name] = {
                "ours_ms": info["median_ms"],
                "baseline_ms": baseline["median_ms"],
                "speedup": baseline["speedup"],
                "ours_mib": info["peak_memory_bytes"] / MEBIBYTE,
                "baseline_mib": baseline["peak_memory_bytes"] / MEBIBYTE,
            }
    return rows


def same_rows(runs: Sequence[dict]) -> list:
    """The keys of every run, which must be the same.

    Raises:
        ValueError: a row is missing in one of the runs.
    """
    keys = list(runs[0])
    for number, run in enumerate(runs[1:], start=2):
        if run.keys() != runs[0].keys():
            odd = sorted(str(key) for key in run.keys() ^ runs[0].keys())
            raise ValueError(
                f"results: every run must have the same rows, but the first and number {number} "
                f"differ in {', '.join(odd)}"
            )
    return keys


def markdown_table(results: Sequence[Results]) -> str:
    """A row for each work and baseline of `make bench`: times, speed-up, peak memory."""
    runs = [read_rows(each) for each in results]
    lines = []
    for work, baseline in same_rows(runs):
        found = [run[work, baseline] for run in runs]
        column = {name: [row[name] for row in found] for name in found[0]}
        speedup = emphasised(span(column["speedup"], 1, "x"), min(column["speedup"]) > 1)
        memory = f"{span(column['ours_mib'], 1)} / {span(column['baseline_mib'], 1)}"
        ours, theirs = span(column["ours_ms"], 2), span(column["baseline_ms"], 1)
        lines.append((work, ours, baseline, theirs, speedup, memory))
    columns = (
        "work", "ours, ms", "baseline", "baseline, ms", "speed-up",
        "peak memory, ours / baseline, MiB",
    )  # fmt: skip
    return table(columns, lines)


def published_table(results: Sequence[Results]) -> str:
    """A row for each work of `benchmarks.published`, and the memory of both processes.

    The ratio of a run is the median over its rounds; the last column has the least round of all.
    """
    lines = []
    for work in same_rows([each["rows"] for each in results]):
        found = [each["rows"][work] for each in results]
        column = {name: [row[name] for row in found] for name in found[0]}
        ratio = emphasised(span(column["median_ratio"], 2, "x"), min(column["median_ratio"]) > 1)
        ours, theirs = span(column["ours_ms"], 1), span(column["published_ms"], 1)
        lines.append((work, ours, theirs, ratio, f"{min(column['least_ratio']):.2f}x"))
    memory = [each["peak_memory_mib"] for each in results]
    shares = span((each["published"] / each["ours"] for each in memory), 2, "x")
    mine, theirs = (span((each[name] for each in memory), 0) for name in ("ours", "published"))
    columns = ("work", "ours, ms", "published code, ms", "speed-up", "least round")
    peak = f"Peak memory: ours {mine} MiB, published code {theirs} MiB ({shares} ours)."
    return f"{table(columns, lines)}\n\n{peak}"


def requirement_lines(results: Results) -> list[tuple[bool, str]]:
    """(met, text) for every figure that a benchmark of one run has to reach."""
    lines = []
    for entry in results["benchmarks"]:
        info = entry.get("extra_info", {})
        for need in info.get("requirements", ()):
            baseline = info["baselines"][need["baseline"]]
            met = baseline["speedup"] >= need["min_speedup"]
            text = (
                f"{entry['group']} against {need['baseline']}: "
                f"{baseline['speedup']:.2f}x (at least {need['min_speedup']:g}x)"
            )
            if need["max_memory_share"] is not None:
                met = met and baseline["memory_share"] <= need["max_memory_share"]
                text += (
                    f", peak memory {baseline['memory_share']:.3f} "
                    f"(at most {need['max_memory_share']:g})"
                )
            lines.append((met, text))
    return lines


def distinct(results: Sequence[Results], text: Callable[[Results], str]) -> str:
    """What the runs say, each answer once."""
    return ", ".join(dict.fromkeys(text(each) for each in results))


def caption(results: Sequence[Results]) -> str:
    """Machines, versions, and how many runs."""
    runs = "one run" if len(results) == 1 else f"{len(results)} runs, least to greatest"
    machine = distinct(
        results,
        lambda each: "{processor_name} with {threads} threads".format(**each["machine_info"]),
    )
    versions = distinct(
        results,
        lambda each: "torch {torch}, Python {python_version}".format(**each["machine_info"]),
    )
    commit = distinct(results, lambda each: each["commit_info"]["id"][:10])
    return f"{machine}; {versions}; commit {commit}; {runs}; medians of interleaved rounds."


def report_campaign(report: Results, output: Path, page: Path | None) -> None:
    """Write a campaign's tables and figures into `output`, fill the places that `page` has."""
    found = campaign.tables(report)
    name = campaign.device_name(report)
    body = "\n\n".join(
        f"## {place.removeprefix('gpu-')}\n\n{text}" for place, text in found.items()
    )
    path = output / f"{name.lower().replace(' ', '-')}.md"
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# {name}\n\n{body}\n", encoding="utf-8")
    print(body, path, sep="\n\n")
    if page:
        fill(page, found)
    try:
        from benchmarks.gpu.plots import draw
    except ImportError as error:
        print(f"no figures: {error}")
    else:
        print(*draw(report, path.with_suffix("")), sep="\n")


def main(argv: list[str] | None = None) -> int:
    """Print the tables of the given results; with ``--readme`` write them there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="JSON files, one for each run")
    parser.add_argument("--readme", type=Path, help="page with the markers to fill in")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder, for a campaign")
    arguments = parser.parse_args(argv)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.results]
    for each in results:
        if "stages" in each:
            report_campaign(each, arguments.output, arguments.readme)
    bench = [each for each in results if "benchmarks" in each]
    published = [each for each in results if "published_info" in each]
    tables = (("published", published, published_table), ("benchmarks", bench, markdown_table))
    for name, runs, make in tables:
        if runs:
            body = f"{caption(runs)}\n\n{make(runs)}"
            if arguments.readme:
                write_between(arguments.readme, name, body)
            print(body, end="\n\n")
    lines = [line for each in bench for line in requirement_lines(each)]
    for met, text in lines:
        print("met  " if met else "SHORT", text)
    return 0 if all(met for met, _ in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
