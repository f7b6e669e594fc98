"""Requests at 32 in flight: none lost, none mixed up, memory flat. REQUESTS=1000 asks for more."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx2 as httpx
import pytest

NUM_REQUESTS, IN_FLIGHT = int(os.environ.get("REQUESTS", "200")), 32
HALF = NUM_REQUESTS // 2
ALONE = range(0, NUM_REQUESTS, 7)  # asked again one at a time
MAX_GROWTH = 16 << 20  # bytes, of the second half after the first


def body_of(index):
    """Requests of different prompts, lengths, seeds and methods; every third is a stream."""
    return {
        "model": "calm",
        "prompt": "Returns the number of"[: 4 + index % 16],
        "max_tokens": 8 + index % 13,
        "seed": index,
        "temperature": 0.5 if index % 10 == 0 else 1,
        "stream": index % 3 == 0,
        "calm": {"num_samples": 8, "max_draws": 8},
    }


async def ask(client, index):
    """Text and tokens of one request."""
    body = body_of(index)
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    if not body["stream"]:
        reply = response.json()
        return reply["choices"][0]["text"], reply["usage"]["completion_tokens"]
    *events, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert [c["finish_reason"] is None for c in choices] == [True] * (len(choices) - 1) + [False]
    return "".join(c["text"] for c in choices), sum(c["calm"]["tokens"] for c in choices)


async def ask_all(url, indices, in_flight):
    """Replies by index, and the seconds that they took together."""
    limits, replies = httpx.Limits(max_connections=in_flight), {}
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        numbers = iter(indices)

        async def work():
            for index in numbers:
                replies[index] = await ask(client, index)

        begin = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(in_flight)))
        return replies, time.perf_counter() - begin


def resident_bytes(process):
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) << 10


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_many_requests(folders):
    command = [
        sys.executable,
        "-m",
        "calm.cli",
        "serve",
        "--model",
        folders / "calm",
        "--port",
        "0",
    ]
    with subprocess.Popen(map(str, command), stderr=subprocess.PIPE, text=True) as process:
        try:
            url = re.search(r"http://\S+?:\d+", process.stderr.readline())[0]
            together, seconds = asyncio.run(ask_all(url, range(HALF), IN_FLIGHT))
            before = resident_bytes(process)
            rest, more = asyncio.run(ask_all(url, range(HALF, NUM_REQUESTS), IN_FLIGHT))
            growth = resident_bytes(process) - before
            alone, seconds_alone = asyncio.run(ask_all(url, ALONE, 1))
            health = httpx.get(f"{url}/health").json()
        finally:
            process.terminate()
            process.wait(60)
    assert process.returncode == 0
    together |= rest
    mixed_up = sum(reply != together[index] for index, reply in alone.items())
    rates = [
        sum(count for _, count in replies.values()) / elapsed
        for replies, elapsed in ((together, seconds + more), (alone, seconds_alone))
    ]
    print(
        f"{NUM_REQUESTS} requests, {IN_FLIGHT} in flight: {NUM_REQUESTS - len(together)} lost, "
        f"{mixed_up} of {len(alone)} mixed up, memory {growth / 2**20:+.1f} MiB, {rates[0]:.0f} "
        f"tokens/s; one at a time {rates[1]:.0f} tokens/s"
    )
    assert mixed_up == 0 and len(together) == NUM_REQUESTS and len(alone) == len(ALONE)
    assert growth < MAX_GROWTH
    assert health["texts"]["calm"] == {"active": 0, "waiting": 0}
    assert len({text for text, _ in together.values()}) > HALF  # they could be mixed up
