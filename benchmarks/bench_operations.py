"""The energy head, the vote and the record of a chunk: torch against the reference backend."""

import pytest
import torch

from benchmarks.measure import Baseline, Requirement, compare
from benchmarks.shapes import HEAD, VOTE
from calm_kernels import EnergyHead, advance_state, agreeing_patch, chunk_record, energy_head

REFERENCE = "reference backend"


def gradients(output, inputs):
    return torch.autograd.grad(output.square().mean(), inputs)


def head_inputs():
    head = EnergyHead(HEAD.hidden_size, HEAD.latent_size, HEAD.noise_size, HEAD.num_blocks)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    hidden = torch.randn(HEAD.num_rows, HEAD.hidden_size, requires_grad=True)
    noise = torch.rand(HEAD.num_rows, HEAD.num_samples, HEAD.noise_size).transpose(0, 1) - 0.5
    return head, hidden, noise


@pytest.mark.benchmark(group="EnergyHead, fwd+bwd")
def bench_energy_head(benchmark):
    head, hidden, noise = head_inputs()
    inputs = (hidden, *head.parameters())

    def run(backend):
        return gradients(energy_head(hidden, noise, head, backend=backend), inputs)

    compare(
        benchmark,
        lambda: run("torch"),
        {REFERENCE: Baseline(lambda: run("reference"))},
        shape=HEAD,
        requirements=(Requirement(REFERENCE, min_speedup=1.15),),
        rounds=15,
    )


@pytest.mark.benchmark(group="EnergyHead, fwd")
@torch.no_grad()
def bench_energy_head_forward(benchmark):
    head, hidden, noise = head_inputs()

    def run(backend):
        return energy_head(hidden, noise, head, backend=backend)

    compare(
        benchmark,
        lambda: run("torch"),
        {REFERENCE: Baseline(lambda: run("reference"))},
        shape=HEAD,
        rounds=15,
    )


@pytest.mark.parametrize("distinct", [4, 60], ids=["high agreement", "low agreement"])
def bench_agreeing_patch(benchmark, distinct):
    benchmark.group = f"agreeing_patch, {distinct} distinct ids a place"
    shape = (VOTE.batch_size, VOTE.num_candidates, VOTE.patch_size)
    candidates = torch.randint(distinct, shape)

    def run(backend):
        return agreeing_patch(candidates, VOTE.num_agreeing, seed=1, backend=backend)

    baseline = Baseline(lambda: run("reference"), rtol=0, atol=0)
    compare(benchmark, lambda: run("torch"), {REFERENCE: baseline}, shape=VOTE)


@pytest.mark.benchmark(group="chunk_record")
def bench_chunk_record(benchmark):
    """The tensors of a record against the host's own loop, for one draw of each sequence."""
    tokens = torch.randint(1000, (VOTE.batch_size, VOTE.patch_size))
    values = torch.randn(1, VOTE.batch_size, HEAD.latent_size)

    def run(backend):
        return chunk_record(tokens, values, backend=backend)

    baseline = Baseline(lambda: run("reference"), rtol=0, atol=0)
    compare(benchmark, lambda: run("torch"), {REFERENCE: baseline}, shape=VOTE)


@pytest.mark.benchmark(group="advance_state")
def bench_advance_state(benchmark):
    """In place: every call reads what the one before has written."""
    record = torch.randint(1000, (VOTE.batch_size, VOTE.patch_size + 5))
    sizes = ((VOTE.batch_size, VOTE.patch_size), (VOTE.batch_size, 2), (VOTE.batch_size,))
    state = [torch.zeros(size, dtype=torch.int64) for size in sizes]

    def run(backend):
        advance_state(record, *state, backend=backend)
        return state[0]

    baseline = Baseline(lambda: run("reference"), rtol=0, atol=0)
    compare(benchmark, lambda: run("torch"), {REFERENCE: baseline}, shape=VOTE)
