"""What a call launches on the device, and how long each kernel takes there."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

__all__ = ["kernels_of"]

LONGEST = 25


def kernels_of(run: Callable[[], object], device: str) -> dict[str, Any]:
    """Kernels, copies and fills of one call: how many, their time together, those that take longest
    with their counts. On a CPU operators stand for kernels.
    """
    is_gpu = device != "cpu"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        run()
        if is_gpu:
            torch.cuda.synchronize(device)
    kind = DeviceType.CUDA if is_gpu else DeviceType.CPU
    found = [
        (entry.self_device_time_total if is_gpu else entry.self_cpu_time_total, entry)
        for entry in profiler.key_averages()
        if entry.device_type == kind and not entry.is_user_annotation
    ]
    found.sort(key=lambda each: -each[0])
    return {
        "launches": sum(entry.count for _, entry in found),
        "device_ms": sum(time for time, _ in found) / 1e3,
        "longest_kernels": [
            {"name": entry.key[:80], "count": entry.count, "ms": time / 1e3}
            for time, entry in found[:LONGEST]
        ],
    }
