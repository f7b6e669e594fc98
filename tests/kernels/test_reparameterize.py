"""Posterior draws and clipped KL divergence."""

import math

import pytest
import torch
from helpers import assert_no_worse_than_plain, leaf, saved_bytes

from calm_kernels import noise, reparameterize
from calm_kernels.noise import Stream

SHAPES = [(1, 2), (7, 6), (3, 5, 16), (64, 130), (2, 0, 8)]
FLOOR, DROPOUT = 0.5, 0.15


def shape_id(shape):
    return "x".join(map(str, shape))


def make_case(shape, generator):
    """States, noise and kept elements for the given shape of the states."""
    half = (*shape[:-1], shape[-1] // 2)
    return (
        torch.randn(shape, generator=generator, dtype=torch.float64),
        torch.randn(half, generator=generator, dtype=torch.float64),
        torch.rand(half, generator=generator) >= DROPOUT,
    )


def run(case, dtype, backend, dropout=DROPOUT):
    """Latent, KL and the gradient of a sum in which both take part."""
    states, epsilon, keep = case
    states = leaf(states, dtype)
    latent, kl = reparameterize(
        states, kl_floor=FLOOR, dropout=dropout, latent_noise=epsilon.to(dtype), latent_keep=keep,
        backend=backend,
    )  # fmt: skip
    total = (latent.double().sin()).sum() + (kl.double() ** 2).sum()
    return [latent.detach(), kl.detach(), *torch.autograd.grad(total, states)]


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_as_good_as_the_formula(shape, dtype, backend, generator):
    case = make_case(shape, generator)
    states, epsilon, keep = case
    case = (states.to(dtype).double(), epsilon.to(dtype).double(), keep)  # the same numbers
    actual, plain = run(case, dtype, backend), run(case, dtype, "reference")
    assert actual[0].dtype == dtype
    assert actual[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_no_worse_than_plain(actual, plain, run(case, torch.float64, "reference"))


def test_formula_element_by_element(backend):
    mean, log_std, epsilon = 0.8, -0.4, 1.5
    states = torch.tensor([mean, log_std], dtype=torch.float64)
    latent, kl = reparameterize(
        states, kl_floor=0.0, dropout=0.2, latent_noise=torch.tensor([epsilon]).double(),
        latent_keep=torch.tensor([True]), backend=backend,
    )  # fmt: skip
    std = math.exp(log_std)
    assert latent.item() == pytest.approx((mean + std * epsilon) / 0.8)
    assert kl.item() == pytest.approx(0.5 * (mean**2 + std**2 - 1) - log_std)


def test_the_floor_holds_per_dimension_and_passes_gradients_where_it_is_met(backend):
    # KL of each dimension: 0.5 (at the floor), 0 (below), 2 (above); all exact in binary.
    states = torch.tensor([[1.0, 0.0, 2.0, 0.0, 0.0, 0.0]], requires_grad=True)
    _, kl = reparameterize(states, kl_floor=0.5, latent_noise=torch.zeros(1, 3), backend=backend)
    assert kl.tolist() == [0.5 + 0.5 + 2.0]
    kl.sum().backward()
    assert states.grad.tolist() == [[1.0, 0.0, 2.0, 0.0, 0.0, 0.0]]


def test_gradcheck(backend, generator):
    states, epsilon, keep = make_case((3, 10), generator)

    def function(states):
        return reparameterize(
            states, kl_floor=FLOOR, dropout=DROPOUT, latent_noise=epsilon, latent_keep=keep,
            backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, leaf(states))


def test_dropout_scales_what_it_keeps(backend):
    states = torch.ones(2000, 8)
    states[:, 4:] = -30.0  # no spread
    latent, _ = reparameterize(states, kl_floor=0.0, dropout=0.25, seed=1, backend=backend)
    kept = latent != 0
    torch.testing.assert_close(latent[kept], torch.full_like(latent[kept], 1 / 0.75))
    share = kept.double().mean().item()
    assert abs(share - 0.75) < 4 * math.sqrt(0.75 * 0.25 / kept.numel())


def test_seeded_draws_are_those_of_the_noise_module(backend):
    states = torch.randn(6, 10)
    drawn = reparameterize(
        states, kl_floor=FLOOR, dropout=DROPOUT, seed=11, first_row=4, backend=backend
    )
    epsilon = noise.normal(6, 5, stream=Stream.LATENT, seed=11, first_row=4)
    keep = noise.uniform(6, 5, stream=Stream.LATENT_KEEP, seed=11, first_row=4) >= DROPOUT
    given = reparameterize(
        states, kl_floor=FLOOR, dropout=DROPOUT, latent_noise=epsilon, latent_keep=keep,
        backend=backend,
    )  # fmt: skip
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(drawn, given, strict=True))


def test_any_split_of_the_batch_draws_the_same(backend):
    states = torch.randn(9, 8)
    options = {"kl_floor": FLOOR, "dropout": DROPOUT, "seed": 3, "backend": backend}
    whole = reparameterize(states, **options)
    again = reparameterize(states, **options)
    parts = [reparameterize(states[rows], first_row=rows.start, **options)
             for rows in (slice(0, 4), slice(4, 9))]  # fmt: skip
    for index in range(2):
        assert torch.equal(whole[index], again[index])
        assert torch.equal(whole[index], torch.cat([part[index] for part in parts]))


def test_fresh_draws_follow_the_default_generator(backend):
    states = torch.zeros(4, 8)

    def draw():
        return reparameterize(states, kl_floor=FLOOR, backend=backend)[0]

    torch.manual_seed(5)
    first, second = draw(), draw()
    torch.manual_seed(5)
    assert torch.equal(first, draw())
    assert not torch.equal(first, second)


def test_leading_axes_of_a_draw_are_free(backend, generator):
    states, epsilon, keep = make_case((2, 3, 8), generator)
    options = {"kl_floor": FLOOR, "dropout": DROPOUT, "backend": backend}
    shaped = reparameterize(states, latent_noise=epsilon, latent_keep=keep, **options)
    flat = reparameterize(
        states, latent_noise=epsilon.view(6, 4), latent_keep=keep.view(6, 4), **options
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(shaped, flat, strict=True))


def test_strided_states(backend, generator):
    states, epsilon, keep = make_case((5, 12), generator)
    strided = states.T.contiguous().T
    options = {"kl_floor": FLOOR, "latent_noise": epsilon, "latent_keep": keep, "backend": backend}
    for ours, theirs in zip(
        reparameterize(strided, **options), reparameterize(states, **options), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_torch_backend_keeps_little_more_than_its_inputs(generator):
    states, epsilon, keep = make_case((64, 64), generator)
    kept = {}
    for backend in ("reference", "torch"):
        states = leaf(states, torch.float32)
        kept[backend], _ = saved_bytes(
            lambda states=states, backend=backend: reparameterize(
                states,
                kl_floor=FLOOR,
                dropout=DROPOUT,
                latent_noise=epsilon.float(),
                latent_keep=keep,
                backend=backend,
            )
        )
    assert kept["torch"] <= 2 * states.numel() * 4 < kept["reference"]


def test_no_second_derivative():
    states = torch.zeros(2, 8, requires_grad=True)
    _, kl = reparameterize(states, kl_floor=0.0, backend="torch")
    with pytest.raises(RuntimeError, match="reparameterize is differentiable once"):
        torch.autograd.grad(kl.sum(), states, create_graph=True)


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # dynamo's own
def test_compiles_to_one_graph(generator):
    states, epsilon, keep = make_case((4, 12), generator)

    def function(states):
        return reparameterize(
            states, kl_floor=FLOOR, dropout=DROPOUT, latent_noise=epsilon, latent_keep=keep,
            backend="torch",
        )  # fmt: skip

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (compiled, function):
        inputs = leaf(states)
        latent, kl = call(inputs)
        results.append((latent, kl, *torch.autograd.grad(latent.sum() + kl.sum(), inputs)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"latent_states": [1.0]}, TypeError, "latent_states must be a tensor"),
        ({"latent_states": torch.zeros(2, 7)}, ValueError, "even last dimension.*7"),
        (
            {"latent_states": torch.zeros(2, 8, dtype=torch.int64)},
            TypeError,
            "latent_states.*int64",
        ),
        ({"kl_floor": -0.1}, ValueError, "kl_floor.*-0.1"),
        ({"kl_floor": math.nan}, ValueError, "kl_floor.*nan"),
        ({"dropout": 1.0}, ValueError, "dropout.*1.0"),
        ({"latent_noise": torch.zeros(2, 3)}, ValueError, r"latent_noise.*2 rows of 4.*\(2, 3\)"),
        ({"latent_noise": torch.zeros(3, 4)}, ValueError, r"latent_noise.*\(3, 4\)"),
        ({"latent_keep": torch.ones(2, 4)}, TypeError, "latent_keep.*bool.*float32"),
        ({"seed": 1.5}, TypeError, "seed"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_input(changes, error, message):
    arguments = {"latent_states": torch.zeros(2, 8), "kl_floor": 0.5, **changes}
    with pytest.raises(error, match=message):
        reparameterize(**arguments)
