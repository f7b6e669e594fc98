"""The generative head: published formula, hoisted context, draws."""

import copy
import math
from pathlib import Path

import pytest
import torch
from head_cases import make_head, make_inputs, run, size_id
from helpers import assert_no_worse_than_plain, leaf, saved_bytes
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from calm_kernels import EnergyHead, energy_head, noise
from calm_kernels.noise import Stream

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"

# width, latent, noise, blocks, draws, rows; the last is large enough for oneDNN
SIZES = [
    (8, 4, 3, 1, 2, (1,)),
    (12, 5, 7, 2, 3, (2, 3)),
    (33, 17, 9, 3, 1, ()),
    (64, 32, 8, 2, 4, (70,)),
]


@pytest.mark.parametrize("size", SIZES, ids=size_id)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_as_good_as_the_formula(size, dtype, backend, generator):
    head = make_head(size, generator).to(dtype)
    inputs = [value.to(dtype) for value in make_inputs(size, generator)]
    actual, plain = (run(head, inputs, dtype, name) for name in (backend, "reference"))
    assert actual[0].shape == (size[4], *size[5], size[1])
    assert_no_worse_than_plain(actual, plain, run(head, inputs, torch.float64, "reference"))


@pytest.mark.parametrize("case", ["energy-k1", "energy-k2", "energy-k4"])
def test_published_samples(case, backend):
    weights_file = GOLDENS / case / "pytorch_model.bin"
    if weights_file.exists():
        weights = torch.load(weights_file, weights_only=True)
    else:
        weights = load_file(GOLDENS / case / "model.safetensors")
    parameters = {  # a published file holds one name of the head, or both
        name.split(".", 1)[1]: value
        for name, value in weights.items()
        if name.startswith(("mlp_generator.", "generative_head."))
    }
    golden = load_file(GOLDENS / case / "io.safetensors")
    latent = energy_head(
        golden["hidden_states"], golden["head.d000_rand"] - 0.5, parameters, backend=backend
    )
    torch.testing.assert_close(latent, golden["head.sample"], rtol=1e-4, atol=1e-5)


def test_gradcheck(backend, generator):
    size = (6, 3, 4, 2, 2, (2,))
    head, inputs = make_head(size, generator), make_inputs(size, generator)
    names = [name for name, _ in head.named_parameters()]

    def function(hidden, drawn, *values):
        parameters = dict(zip(names, values, strict=True))
        return energy_head(hidden, drawn, parameters, backend=backend)

    leaves = [leaf(value) for value in (*inputs, *head.parameters())]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_one_draw_a_row_is_the_published_call(backend, generator):
    """Hidden states repeated by the caller, one draw for each copy."""
    size = (12, 5, 7, 2, 3, (2, 4))
    head = make_head(size, generator)
    hidden, drawn = make_inputs(size, generator)
    several = head(hidden, drawn, backend=backend)
    repeated = head(hidden.expand(3, *hidden.shape), drawn, backend=backend)
    torch.testing.assert_close(several, repeated)
    torch.testing.assert_close(head(hidden, drawn[1], backend=backend), several[1])
    torch.testing.assert_close(
        head(hidden[0, 0], drawn[2, 0, 0], backend=backend), several[2, 0, 0]
    )


def test_a_row_does_not_depend_on_the_others(backend, generator):
    size = (12, 5, 7, 2, 3, (9,))
    head = make_head(size, generator)
    hidden, drawn = make_inputs(size, generator)
    latent = head(hidden, drawn, backend=backend)
    order = torch.randperm(9, generator=generator)
    torch.testing.assert_close(
        head(hidden[order], drawn[:, order], backend=backend), latent[:, order]
    )
    torch.testing.assert_close(head(hidden[4:5], drawn[:, 4:5], backend=backend), latent[:, 4:5])


def test_work_that_does_not_depend_on_the_noise_is_done_once_a_row(generator):
    """Multiplications of blocks: 6 C² a draw as published, 5 C² a draw and C² a row here."""
    size = (16, 8, 4, 3, 8, (5,))
    width, latent, noise_size, blocks, draws, (rows,) = size
    head, inputs = make_head(size, generator), make_inputs(size, generator)
    flops = {}
    for backend in ("reference", "torch"):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            head(*inputs, backend=backend)
        flops[backend] = counter.get_total_flops()
    ends = noise_size * width + width * width + width * latent  # noise_embd and the final layer
    square = width * width
    published = draws * rows * (ends + square + 6 * blocks * square)
    hoisted = draws * rows * (ends + 5 * blocks * square) + rows * (square + blocks * square)
    assert flops == {"reference": 2 * published, "torch": 2 * hoisted}


def test_draws_of_a_row_are_neighbours_in_memory(generator):
    size = (12, 5, 7, 2, 3, (2, 4))
    latent = make_head(size, generator)(*make_inputs(size, generator), backend="torch")
    assert latent.permute(1, 2, 0, 3).is_contiguous()


def test_recomputation_keeps_less_and_changes_nothing(backend, generator):
    size = (32, 16, 8, 4, 8, (64,))
    head = make_head(size, generator)
    inputs = make_inputs(size, generator)
    results = [run(head, inputs, torch.float64, backend, recompute=flag) for flag in (False, True)]
    torch.testing.assert_close(*results)

    parameters = sum(value.numel() * value.element_size() for value in head.parameters())
    kept = []
    for flag in (False, True):
        total, _ = saved_bytes(lambda flag=flag: head(*inputs, recompute=flag, backend=backend))
        kept.append(total - parameters)
    assert kept[1] < 0.3 * kept[0]


def test_autocast(backend, generator):
    size = (16, 8, 4, 2, 3, (5,))
    head = make_head(size, generator, torch.float32)
    inputs = [value.float() for value in make_inputs(size, generator)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = head(*inputs, backend=backend)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), head(*inputs, backend=backend), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_to_one_graph(compiler, recompute, generator):
    size = (8, 4, 3, 2, 2, (3,))
    head = make_head(size, generator)
    hidden, drawn = make_inputs(size, generator)

    def function(hidden):
        return head(hidden, drawn, recompute=recompute, backend="torch")

    results = []
    for call in (torch.compile(function, fullgraph=True, backend=compiler), function):
        inputs = leaf(hidden)
        latent = call(inputs)
        wanted = (inputs, *head.parameters())
        results.append([latent.detach(), *torch.autograd.grad(latent.square().sum(), wanted)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 4, 3)], ids=["no-rows", "no-draws"])
def test_empty(shape, backend):
    draws, rows, noise_size = shape
    head = EnergyHead(8, 5, noise_size, 2)
    latent = head(torch.zeros(rows, 8), torch.zeros(shape), backend=backend)
    assert latent.shape == (draws, rows, 5)
    latent.sum().backward()


def test_published_parameter_names():
    block = [f"mlp_blocks.0.{name}" for name in
             ("in_ln", "linears.0", "linears.2", "linears.4", "down_proj")]  # fmt: skip
    names = ["noise_embd", "norm_noise", "hidden_embd", "norm_hidden", *block,
             "final_layer.in_ln", "final_layer.linears.0", "final_layer.linears.2"]  # fmt: skip
    state = EnergyHead(8, 4, 3, 1).state_dict()
    assert sorted(state) == sorted(
        f"{name}.{part}" for name in names for part in ("weight", "bias")
    )
    assert state["mlp_blocks.0.linears.0.weight"].shape == (8, 16)
    assert state["mlp_blocks.0.linears.4.weight"].shape == (16, 8)


def test_start_of_the_last_layer():
    head = EnergyHead(64, 32, 3, 1)
    assert not head.sample(torch.randn(5, 64), num_samples=2).any()  # published: zero
    head.reset_output("scaled")
    assert head.output.weight.std().item() == pytest.approx(1 / 8, rel=0.1)
    assert not head.output.bias.any()
    head.reset_output()
    assert not head.output.weight.any()
    with pytest.raises(ValueError, match="init must be 'zero' or 'scaled', got 'random'"):
        EnergyHead(8, 4, 3, 1, init="random")


class TestSample:
    @pytest.fixture
    def head(self, generator):
        return make_head((12, 5, 6, 2), generator)

    @pytest.fixture
    def hidden(self, generator):
        return torch.randn(3, 2, 12, generator=generator, dtype=torch.float64)

    def test_shapes(self, head, hidden):
        assert head.sample(hidden).shape == (3, 2, 5)
        assert head.sample(hidden, num_samples=4).shape == (4, 3, 2, 5)
        assert head.sample(hidden[0, 0]).shape == (5,)
        assert head.sample(hidden[0, 0], num_samples=1).shape == (1, 5)
        assert head.sample(hidden[:0], num_samples=2).shape == (2, 0, 2, 5)

    def test_draws_are_centred_uniforms_of_the_noise_module(self, head, hidden):
        drawn = noise.uniform(6, 6, stream=Stream.HEAD, seed=9, num_draws=4, first_row=2)
        drawn = (drawn - 0.5).double().reshape(4, 3, 2, 6)
        expected = head(hidden, drawn)
        assert torch.equal(head.sample(hidden, num_samples=4, seed=9, first_row=2), expected)
        assert torch.equal(head.sample(hidden, drawn), expected)

    def test_any_split_of_the_rows_draws_the_same(self, head, hidden):
        rows = hidden.flatten(0, 1)
        whole = head.sample(rows, num_samples=3, seed=1, first_row=10)
        parts = [head.sample(rows[:2], num_samples=3, seed=1, first_row=10),
                 head.sample(rows[2:], num_samples=3, seed=1, first_row=12)]  # fmt: skip
        torch.testing.assert_close(torch.cat(parts, dim=1), whole)

    def test_a_seed_per_row_makes_rows_independent_of_the_batch(self, head, hidden):
        rows = hidden.flatten(0, 1)
        seeds = torch.arange(100, 106)
        together = head.sample(rows, num_samples=3, seed=seeds)
        order = torch.tensor([5, 0, 3])
        torch.testing.assert_close(
            head.sample(rows[order], num_samples=3, seed=seeds[order]), together[:, order]
        )

    def test_fresh_draws_follow_the_default_generator(self, head, hidden):
        torch.manual_seed(0)
        first, second = head.sample(hidden), head.sample(hidden)
        torch.manual_seed(0)
        assert torch.equal(head.sample(hidden), first)
        assert not torch.equal(first, second)

    def test_noise_scale(self, head, hidden):
        zero = head.sample(hidden, num_samples=3, noise_scale=0.0)
        silent = head(hidden, torch.zeros(3, 2, 6, dtype=torch.float64))
        torch.testing.assert_close(zero, silent.expand(3, 3, 2, 5))
        drawn = torch.rand(4, 3, 2, 6, dtype=torch.float64) - 0.5
        torch.testing.assert_close(
            head.sample(hidden, drawn, noise_scale=0.5), head.sample(hidden, 0.5 * drawn)
        )

    def test_noise_spread_multiplies_what_the_norm_gives(self, head, hidden, backend):
        plain = head.sample(hidden, num_samples=3, seed=1, backend=backend)
        same = head.sample(hidden, num_samples=3, seed=1, noise_spread=1.0, backend=backend)
        assert torch.equal(same, plain)
        before = {name: value.clone() for name, value in head.state_dict().items()}
        actual = head.sample(hidden, num_samples=3, seed=1, noise_spread=0.3, backend=backend)
        for name, value in head.state_dict().items():
            assert torch.equal(value, before[name]), name
        narrow = copy.deepcopy(head)
        narrow.norm_noise.weight.data *= 0.3
        expected = narrow.sample(hidden, num_samples=3, seed=1, backend="reference")
        torch.testing.assert_close(actual, expected)
        assert not torch.allclose(actual, plain, atol=1e-2)

    def test_no_spread_is_deterministic(self, head, hidden, backend):
        first, second = (
            head.sample(hidden, num_samples=3, seed=seed, noise_spread=0.0, backend=backend)
            for seed in (1, 2)
        )
        assert torch.equal(first, second)
        torch.testing.assert_close(first, first[:1].expand_as(first))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"noise_scale": -1.0}, "noise_scale.*-1.0"),
            ({"noise_scale": math.inf}, "noise_scale.*inf"),
            ({"noise_spread": -1.0}, "noise_spread must be finite and at least 0, got -1.0"),
            ({"noise_spread": math.nan}, "noise_spread.*nan"),
            ({"noise": torch.zeros(2, 3, 2, 6), "num_samples": 4}, "num_samples=4.*2, 3, 2, 6"),
            ({"noise": torch.zeros(3, 2, 6), "num_samples": 3}, "num_samples=3"),
            ({"num_samples": -1}, "num_samples must be at least 0"),
        ],
    )
    def test_bad_input(self, head, hidden, options, message):
        with pytest.raises(ValueError, match=message):
            head.sample(hidden, **options)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(2, 7)}, ValueError, r"hidden must have shape \(2, 8\)"),
        ({"noise": torch.zeros(2, 4)}, ValueError, r"noise must have shape \(2, 3\)"),
        ({"noise": torch.zeros(5, 3, 3)}, ValueError, r"noise must have shape \(5, 2, 3\)"),
        ({"noise": torch.zeros(2, 3).long()}, TypeError, "noise must have dtype.*int64"),
        (
            {"hidden": torch.zeros(2, 8).double()},
            TypeError,
            "parameters must have the dtype of hidd",
        ),
        ({"parameters": {}}, ValueError, "parameters must hold 'noise_embd.weight'"),
    ],
)
def test_bad_input(changes, error, message, backend):
    arguments = {"hidden": torch.zeros(2, 8), "noise": torch.zeros(2, 3),
                 "parameters": EnergyHead(8, 4, 3, 1), **changes}  # fmt: skip
    with pytest.raises(error, match=message):
        energy_head(**arguments, backend=backend)


@pytest.mark.parametrize("name", ["hidden_size", "latent_size", "noise_size", "num_blocks"])
def test_bad_sizes(name):
    sizes = {"hidden_size": 8, "latent_size": 4, "noise_size": 3, "num_blocks": 1, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        EnergyHead(**sizes)
