"""The kernels' random numbers are those of noise.py."""

import pytest
import torch
import triton
import triton.language as tl

from calm_kernels import EnergyHead, gaussian_energy_score, noise, reparameterize
from calm_kernels.noise import Stream
from calm_kernels.noise_kernels import load_key, normal_at, normal_slices, philox, uniform_at

# Box-Muller in float32: the angle is rounded once more in torch than in the portable kernel. Three
# roundings of a number up to 5.4: 3 x 5.4 x 1.2e-7.
NORMAL_TOLERANCE = 2e-6
SEEDS = [0, -123456789012345, 2**63 - 1]


@triton.jit
def words_kernel(out_ptr, counter_ptr, key_ptr):
    k0 = tl.load(key_ptr).to(tl.uint32)
    k1 = tl.load(key_ptr + 1).to(tl.uint32)
    column = tl.arange(0, 4)
    c0 = tl.load(counter_ptr + 4 * column).to(tl.uint32)
    c1 = tl.load(counter_ptr + 4 * column + 1).to(tl.uint32)
    c2 = tl.load(counter_ptr + 4 * column + 2).to(tl.uint32)
    c3 = tl.load(counter_ptr + 4 * column + 3).to(tl.uint32)
    words = philox(c0, c1, c2, c3, k0, k1)
    for index in tl.static_range(4):
        tl.store(out_ptr + 4 * column + index, words[index].to(tl.int64))


@triton.jit
def draws_kernel(
    normal_ptr, uniform_ptr, seed_ptr, first_row_ptr, stride_seed,
    DRAWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    element = tl.arange(0, BLOCK)
    k0, k1, c1, c2, c3 = load_key(seed_ptr, first_row_ptr, row, stride_seed, STREAM)
    for m in range(DRAWS):
        offs = (row * DRAWS + m) * WIDTH + element
        normal = normal_at(m, element, k0, k1, c1, c2, c3, (WIDTH + 7) // 8, False)
        tl.store(normal_ptr + offs, normal, mask=element < WIDTH)
        uniform = uniform_at(m, element, k0, k1, c1, c2, c3, (WIDTH + 3) // 4)
        tl.store(uniform_ptr + offs, uniform, mask=element < WIDTH)


@triton.jit
def slices_kernel(out_ptr, seed_ptr, first_row_ptr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    q = tl.arange(0, BLOCK)
    k0, k1, c1, c2, c3 = load_key(seed_ptr, first_row_ptr, tl.program_id(0), 0, 3)
    c0 = q.to(tl.uint32)
    zero = c0 * 0
    slices = normal_slices(c0, c1 + zero, c2 + zero, c3 + zero, k0, k1, False)
    for k in tl.static_range(8):
        offs = tl.program_id(0) * 8 * WORDS + k * WORDS + q
        tl.store(out_ptr + offs, slices[k], mask=q < WORDS)


def test_published_vectors():
    """Random123, tests/kat_vectors, philox4x32 10, through the kernel."""
    counters = [[0] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]] * 2
    out = torch.empty(4, 4, dtype=torch.int64)
    words_kernel[(1,)](out, torch.tensor(counters), torch.tensor([0, 0]))
    assert out[0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    words_kernel[(1,)](out, torch.tensor(counters), torch.tensor([0xA4093822, 0x299F31D0]))
    assert out[1].tolist() == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("width", [1, 7, 64, 100])
def test_same_draws(width, seed):
    rows, draws, first_row = 3, 5, 2**32 - 2  # a row number that leaves 32 bits on the way
    pair = torch.tensor([seed, 7 << 33])
    normal, uniform = torch.empty(rows, draws, width), torch.empty(rows, draws, width)
    block = triton.next_power_of_2(width)
    first = torch.tensor(first_row)
    draws_kernel[(rows,)](normal, uniform, pair, first, 0, draws, width, block, Stream.TARGETS)
    options = {"stream": Stream.TARGETS, "seed": pair, "num_draws": draws, "first_row": first_row}
    expected = noise.uniform(rows, width, **options).transpose(0, 1)
    assert torch.equal(uniform, expected)
    expected = noise.normal(rows, width, **options).transpose(0, 1)
    torch.testing.assert_close(normal, expected, rtol=0, atol=NORMAL_TOLERANCE)


def test_a_seed_a_row():
    seeds = torch.tensor([[3, 0], [5, 1]])
    normal, uniform = torch.empty(2, 2, 16), torch.empty(2, 2, 16)
    draws_kernel[(2,)](normal, uniform, seeds, torch.tensor(9), 2, 2, 16, 16, Stream.TARGETS)
    options = {"stream": Stream.TARGETS, "seed": seeds, "num_draws": 2, "first_row": 9}
    assert torch.equal(uniform, noise.uniform(2, 16, **options).transpose(0, 1))


def test_slices_of_one_call():
    width, rows = 40, 2
    out = torch.empty(rows, width)
    slices_kernel[(rows,)](out, torch.tensor([11, 2]), torch.tensor(4), width // 8, 8)
    expected = noise.normal(
        rows, width, stream=Stream.LATENT, seed=torch.tensor([11, 2]), first_row=4
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=NORMAL_TOLERANCE)


def test_operations_share_the_memory_of_a_first_row(monkeypatch):
    """Energy head, energy score and autoencoder of a micro-batch; the next step fills nothing."""
    fills, full = [], torch.full
    monkeypatch.setattr(torch, "full", lambda *a, **k: fills.append(a[1]) or full(*a, **k))
    noise._kept.cache_clear()
    head = EnergyHead(16, 8, 4, 1, init="scaled")
    hidden, states = torch.randn(3, 16), torch.randn(3, 16)
    address = {"seed": torch.tensor([1, 2]), "first_row": 12, "backend": "triton"}
    for _ in range(2):
        samples = head.sample(hidden, num_samples=2, **address)
        gaussian_energy_score(
            samples, *states.split(8, 1), targets="sample", num_targets=2, **address
        )
        reparameterize(states, kl_floor=0.5, **address)
    assert fills.count(12) == 1
