"""Tables from saved results: ``python benchmarks/report.py FILE.json [--readme README.md]``.

No number in the README is typed by hand: this script writes the table between the two markers.
"""

import argparse
import json
import sys
from pathlib import Path

__all__ = ["main", "markdown_table", "requirement_lines"]

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
MEBIBYTE = 2**20


def _entries(results: dict) -> list[dict]:
    return [entry for entry in results["benchmarks"] if "rivals" in entry.get("extra_info", {})]


def markdown_table(results: dict) -> str:
    """One row per benchmark and rival: times, speed-up, peak memory."""
    lines = [
        "| work | ours, ms | against | its ms | speed-up | peak memory, ours / its MiB |",
        "|---|---|---|---|---|---|",
    ]
    for entry in _entries(results):
        info = entry["extra_info"]
        for name, rival in info["rivals"].items():
            memory = (
                f"{info['peak_memory_bytes'] / MEBIBYTE:.1f} / "
                f"{rival['peak_memory_bytes'] / MEBIBYTE:.1f}"
            )
            speedup = f"{rival['speedup']:.1f}x"
            lines.append(
                f"| {entry['group']} | {info['median_ms']:.2f} | {name} | {rival['median_ms']:.1f} "
                f"| {f'**{speedup}**' if rival['speedup'] > 1 else speedup} | {memory} |"
            )
    return "\n".join(lines)


def requirement_lines(results: dict) -> list[tuple[bool, str]]:
    """(met, text) for every figure that a benchmark has to reach."""
    lines = []
    for entry in _entries(results):
        info = entry["extra_info"]
        for need in info["requirements"]:
            rival = info["rivals"][need["rival"]]
            met = rival["speedup"] >= need["min_speedup"]
            text = (
                f"{entry['group']} against {need['rival']}: "
                f"{rival['speedup']:.2f}x (at least {need['min_speedup']:g}x)"
            )
            if need["max_memory_share"] is not None:
                met = met and rival["memory_share"] <= need["max_memory_share"]
                text += (
                    f", peak memory {rival['memory_share']:.3f} "
                    f"(at most {need['max_memory_share']:g})"
                )
            lines.append((met, text))
    return lines


def _caption(results: dict) -> str:
    machine, commit = results["machine_info"], results["commit_info"]
    return (
        f"{machine['processor_name']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"Python {machine['python_version']}, commit {commit['id'][:10]}; "
        "medians of interleaved rounds."
    )


def write_readme(results: dict, readme: Path) -> None:
    """Replace what stands between the markers of `readme`."""
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{readme} lacks the markers {BEGIN} and {END}")
    head, rest = text.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    body = f"{BEGIN}\n{_caption(results)}\n\n{markdown_table(results)}\n{END}"
    readme.write_text(head + body + tail, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Print the tables of one result file; with ``--readme`` write them there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="JSON written by pytest-benchmark")
    parser.add_argument("--readme", type=Path, help="file with the two markers to fill in")
    arguments = parser.parse_args(argv)
    results = json.loads(arguments.results.read_text(encoding="utf-8"))
    if arguments.readme:
        write_readme(results, arguments.readme)
    print(_caption(results), "", markdown_table(results), "", sep="\n")
    lines = requirement_lines(results)
    for met, text in lines:
        print("met  " if met else "SHORT", text)
    return 0 if all(met for met, _ in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
