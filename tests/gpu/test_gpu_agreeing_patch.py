"""The voting kernels on the device: the torch backend's choices, captured graphs, no waiting."""

import pytest
import torch

from calm_kernels import agreeing_patch

# The torch backend's sums, which the kernels are compared to.
pytestmark = pytest.mark.filterwarnings("ignore:.* does not have a deterministic implementation")


def draw(shape, distinct, dtype=torch.int64, seed=0):
    """Patches of which some are frequent."""
    generator = torch.Generator("cuda").manual_seed(seed)
    places = torch.rand(shape, device="cuda", generator=generator)
    return (places**2 * distinct).to(dtype)


def assert_same_choices(candidates, num_agreeing, **options):
    options = {"return_counts": True, **options}
    ours = agreeing_patch(candidates, num_agreeing, backend="triton", **options)
    theirs = agreeing_patch(candidates, num_agreeing, backend="torch", **options)
    for name, mine, other in zip(("tokens", "level", "counts"), ours, theirs, strict=True):
        assert torch.equal(mine, other) and mine.dtype == other.dtype, name


@pytest.mark.parametrize("form", ["factory", "gamma"])
@pytest.mark.parametrize("num_agreeing", [1, 2, 3, 2.5, 1.1, 12.7, 300])
@pytest.mark.parametrize("distinct", [1.1, 3, 30])
def test_choices_of_many_rows(distinct, num_agreeing, form):
    assert_same_choices(draw((512, 200, 4), distinct), num_agreeing, form=form, seed=3)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
@pytest.mark.parametrize(
    "shape", [(70, 1024, 4), (3, 4096, 2), (2, 9000, 1), (9, 200, 64), (5, 1, 3)], ids=str
)
def test_shapes_and_dtypes(shape, dtype):
    assert_same_choices(draw(shape, 1.3 if shape[2] == 64 else 4, dtype), 2.5, seed=5)


def test_samples_first_and_a_seed_per_row():
    candidates = draw((200, 65, 4), 4).transpose(0, 1)
    seeds = torch.arange(130, device="cuda").view(65, 2) << 30
    assert_same_choices(candidates, 2, seed=seeds)


def test_one_graph_serves_all_temperatures_and_draws_afresh():
    candidates = draw((64, 200, 4), 3)
    seed = torch.tensor([5, 0], device="cuda")
    power = torch.full((), 2.0, device="cuda")
    options = {"seed": seed, "backend": "triton", "return_counts": True}
    agreeing_patch(candidates, power, **options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seed[1] += 1
        captured = agreeing_patch(candidates, power, **options)
    for number, distinct in ((2.0, 3), (2.0, 3), (3.5, 4), (1.0, 2)):
        power.fill_(number)
        candidates.copy_(draw((64, 200, 4), distinct, seed=7))
        graph.replay()
        expected = agreeing_patch(candidates, number, **options | {"backend": "torch"})
        for mine, other in zip(captured, expected, strict=True):
            assert torch.equal(mine, other)


def test_nothing_waits_for_the_device():
    candidates, seed = draw((64, 5000, 2), 3), torch.tensor([1, 0], device="cuda")
    for part in (candidates, candidates[:, :200]):
        agreeing_patch(part, 2.5, seed=seed, backend="triton")
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            agreeing_patch(part, 2.5, seed=seed, backend="triton")
        finally:
            torch.cuda.set_sync_debug_mode(mode)
