"""Two threads, the environment beside every number, the ratio table at the end."""

import os
import platform

import pytest
import torch

from benchmarks.report import requirement_lines

THREADS = 2


def pytest_configure(config):
    torch.set_num_threads(min(THREADS, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def same_draws():
    torch.manual_seed(0)


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
        return names[0] if names else platform.processor()
    except OSError:
        return platform.processor()


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()  # host names and cache sizes of one machine say nothing to a reader
    machine_info.update(
        processor_name=_processor_name(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python_version=platform.python_version(),
        system=platform.system(),
    )


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
        if "rivals" in bench.extra_info
    ]
    if not entries:
        return
    results = {"benchmarks": entries}
    terminalreporter.section("ratios: rival / ours in one run, medians of interleaved rounds")
    for entry in entries:
        info = entry["extra_info"]
        for name, rival in info["rivals"].items():
            terminalreporter.write_line(
                f"{entry['group']:<44} {info['median_ms']:>9.2f} ms   {name:<28} "
                f"{rival['median_ms']:>9.2f} ms   {rival['speedup']:>6.2f}x   "
                f"memory {info['peak_memory_bytes'] / 2**20:>7.1f} / "
                f"{rival['peak_memory_bytes'] / 2**20:.1f} MiB"
            )
    terminalreporter.section("figures to reach")
    for met, text in requirement_lines(results):
        terminalreporter.write_line(("met    " if met else "SHORT  ") + text)
