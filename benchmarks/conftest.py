"""Two threads, the machine beside every number, and a table of ratios at the end."""

import os

import pytest
import torch

from benchmarks.machine import machine_info as describe_machine
from benchmarks.report import requirement_lines

THREADS = 2


def pytest_configure(config):
    torch.set_num_threads(min(THREADS, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def same_draws():
    torch.manual_seed(0)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()  # without host names and cache sizes
    machine_info.update(describe_machine(torch.get_num_threads()))


def pytest_benchmark_update_json(config, benchmarks, output_json):
    for benchmark in output_json["benchmarks"]:
        benchmark.pop("params", None)
        benchmark["stats"].pop("data", None)
    output_json["commit_info"].pop("author_time", None)


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    entries = [
        {"group": bench.group, "extra_info": bench.extra_info}
        for bench in (session.benchmarks if session else [])
        if "baselines" in bench.extra_info
    ]
    if not entries:
        return
    terminalreporter.section("baseline / ours in one run, medians of interleaved rounds")
    for entry in entries:
        info = entry["extra_info"]
        for name, baseline in info["baselines"].items():
            terminalreporter.write_line(
                f"{entry['group']:<44} {info['median_ms']:>9.2f} ms   {name:<28} "
                f"{baseline['median_ms']:>9.2f} ms   {baseline['speedup']:>6.2f}x   "
                f"memory {info['peak_memory_bytes'] / 2**20:>7.1f} / "
                f"{baseline['peak_memory_bytes'] / 2**20:.1f} MiB"
            )
    terminalreporter.section("figures to reach")
    for met, text in requirement_lines({"benchmarks": entries}):
        terminalreporter.write_line(("met    " if met else "SHORT  ") + text)
