"""Shares of a step's time on a GPU: what counts is when its queue came to a mark."""

import time

import pytest
import torch

from calm.flops import peak_of
from calm.memory import peak_memory
from calm.training.monitoring.speed import BETWEEN, StepTimer

SLEEP = 10**8  # cycles of a kernel that waits: tens of milliseconds


def test_queued_work_counts_where_it_was_queued_and_no_mark_waits_for_it():
    device = torch.device("cuda")
    torch.cuda._sleep(1000)
    torch.cuda.synchronize()
    timer, began = StepTimer(device), time.perf_counter()
    timer.mark(BETWEEN)
    for part, cycles in (("forward", SLEEP), ("backward", 3 * SLEEP)):
        torch.cuda._sleep(cycles)
        timer.mark(part)
    queued = time.perf_counter() - began
    seconds = timer.drain()
    assert seconds["backward"] == pytest.approx(3 * seconds["forward"], rel=0.1)
    assert queued < seconds["forward"] / 2
    time.sleep(0.2)  # the GPU stands idle until it gets its data
    timer.mark("data")
    assert timer.drain()["data"] > 0.19


def test_what_the_device_has_held():
    device = torch.device("cuda")
    size = peak_memory(device) + 2**26
    torch.empty(size, dtype=torch.uint8, device=device)
    assert peak_memory(device) >= size
    assert peak_of(device) is None or peak_of(device) > 1e13
