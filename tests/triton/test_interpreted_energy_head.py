"""The head's kernels against the float64 reference and, for what is drawn, the torch backend."""

import pytest
import torch
from head_cases import make_head, make_inputs, run, size_id
from helpers import assert_no_worse_than_plain, leaf, relative_error, saved_bytes

import calm_kernels.energy_head.function  # noqa: F401 (registers the operators)
from calm_kernels import EnergyHead, energy_head, noise
from calm_kernels.energy_head import activation_kernels, embedding_kernels, norm_kernels
from calm_kernels.energy_head.parameters import Pair, flatten_parameters, gather_parameters
from calm_kernels.noise import Stream

# width, latent, noise, blocks, draws, rows: powers of two and not, tiles with rows missing
SIZES = [
    (8, 4, 3, 1, 2, (1,)),
    (33, 17, 9, 3, 1, ()),
    (64, 16, 64, 2, 5, (2, 3)),
    (48, 5, 7, 1, 3, (13,)),
    (192, 8, 70, 1, 4, (9,)),
]


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("size", SIZES, ids=size_id)
def test_as_good_as_the_formula(size, recompute, generator):
    head = make_head(size, generator).float()
    inputs = [value.float() for value in make_inputs(size, generator)]
    plain = run(head, inputs, torch.float32, "reference")
    actual = run(head, inputs, torch.float32, "triton", recompute=recompute)
    truth = run(head, inputs, torch.float64, "reference")
    assert actual[0].shape == (size[4], *size[5], size[1])
    assert_no_worse_than_plain(actual, plain, truth)


@pytest.mark.parametrize("size", SIZES[2:4], ids=size_id)
def test_drawn_noise_is_that_of_torch(size, generator):
    """Draw by draw: the same seed, the same latents and gradients."""
    head = make_head(size, generator).float()
    hidden = make_inputs(size, generator)[0].float()
    options = {"num_samples": size[4], "seed": 7, "first_row": 3, "noise_scale": 0.8}
    results = []
    for backend in ("triton", "torch"):
        wanted = [leaf(hidden), *(leaf(value) for value in head.parameters())]
        names = [name for name, _ in head.named_parameters()]
        parameters = dict(zip(names, wanted[1:], strict=True))
        latent = energy_head(wanted[0], None, parameters, backend=backend, **options)
        results.append([latent, *torch.autograd.grad(latent.sin().sum(), wanted)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first_row", [11, torch.tensor(11)], ids=["number", "memory"])
def test_drawn_noise_is_that_of_the_noise_module(first_row, generator):
    """Bit by bit: the kernel gives the noise to the weight's gradient."""
    rows, draws, noise_size = 5, 3, 7
    seed = torch.tensor([2**40 + 9, 4])
    drawn = noise.uniform(
        rows, noise_size, stream=Stream.HEAD, seed=seed, num_draws=draws, first_row=first_row
    )
    source = embedding_kernels.Noise(None, seed, first_row, draws, rows, 1.0)
    weight, vector = torch.randn(8, noise_size, generator=generator), torch.ones(8)
    dstream, sums = torch.zeros(rows * draws, 8), torch.zeros(2, 2, 8)
    _, actual = embedding_kernels.embed_noise_backward(
        source, weight, vector, vector, dstream, sums
    )
    assert torch.equal(actual.view(rows, draws, noise_size), drawn.transpose(0, 1) - 0.5)


@pytest.mark.parametrize("spread", [1.0, 0.3, 0.0])
def test_spread_noise_is_that_of_torch(spread, generator):
    size = SIZES[3]
    head = make_head(size, generator).float()
    hidden = make_inputs(size, generator)[0].float()
    options = {"num_samples": size[4], "seed": 7, "noise_spread": spread}
    actual, expected = (
        head.sample(hidden, backend=backend, **options) for backend in ("triton", "torch")
    )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_seed_per_row(generator):
    size = (16, 4, 5, 1, 3, (6,))
    head = make_head(size, generator).float()
    hidden = make_inputs(size, generator)[0].float()
    seeds = torch.stack([torch.arange(100, 106), torch.tensor([0, 3, 1, 0, 2, 9])], dim=1)
    options = {"num_samples": 3, "first_row": 4}
    together = head.sample(hidden, seed=seeds, backend="triton", **options)
    torch.testing.assert_close(
        together, head.sample(hidden, seed=seeds, backend="torch", **options), rtol=1e-4, atol=1e-5
    )
    order = torch.tensor([5, 0, 3])
    torch.testing.assert_close(
        head.sample(hidden[order], seed=seeds[order], backend="triton", **options),
        together[:, order],
    )
    with pytest.raises(ValueError, match="seed has 6 rows for 3 rows"):
        head.sample(hidden[:3], seed=seeds, backend="triton")


def test_strides_and_single_draws(generator):
    """Noise and hidden states that are views; noise without a leading axis."""
    size = (24, 4, 6, 1, 3, (2, 3))
    head = make_head(size, generator).float()
    hidden, drawn = (value.float() for value in make_inputs(size, generator))
    expected = head(hidden, drawn, backend="torch")
    views = torch.stack([hidden, hidden], -1)[..., 0], torch.stack([drawn, drawn], -1)[..., 1]
    actual = head(*views, backend="triton")
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert actual.permute(1, 2, 0, 3).is_contiguous()
    single = head(hidden, drawn[1], backend="triton")
    torch.testing.assert_close(single, expected[1], rtol=1e-4, atol=1e-5)


def test_autocast_keeps_the_residual_stream_in_float32(generator):
    """In float16: the interpreter cuts bfloat16 off instead of rounding it."""
    size = (48, 6, 8, 3, 2, (7,))
    head = make_head(size, generator, torch.float32)
    inputs = [value.float() for value in make_inputs(size, generator)]
    truth = run(head, inputs, torch.float64, "reference")
    with torch.autocast("cpu", dtype=torch.float16):
        plain = run(head, inputs, torch.float32, "reference")
        actual = run(head, inputs, torch.float32, "triton")
    assert actual[0].dtype == torch.float16
    assert all(value.dtype == torch.float32 for value in actual[1:])
    assert_no_worse_than_plain(actual, plain, truth)


def test_bfloat16(generator):
    size = (48, 6, 8, 3, 2, (7,))
    head = make_head(size, generator).bfloat16()
    inputs = [value.bfloat16() for value in make_inputs(size, generator)]
    actual = run(head, inputs, torch.bfloat16, "triton")
    truth = run(head, inputs, torch.float64, "reference")
    for value, wanted in zip(actual, truth, strict=True):
        assert value.dtype == torch.bfloat16
        assert relative_error(value, wanted) < 0.05


def test_recomputation_keeps_one_array_a_block_and_changes_nothing(generator):
    # 18 rows: a number kept for each row would show in the bound below.
    size = (32, 16, 8, 4, 2, (9,))
    head = make_head(size, generator).float()
    inputs = [value.float() for value in make_inputs(size, generator)]
    results = [run(head, inputs, torch.float32, "triton", recompute=flag) for flag in (False, True)]
    for kept, again in zip(*results, strict=True):
        assert torch.equal(kept, again)
    width, rows = size[0], 2 * 9
    others = sum(value.nbytes for value in (*head.parameters(), *inputs))
    total, _ = saved_bytes(lambda: head(*inputs, recompute=True, backend="triton"))
    stream, patches = 4 * rows * width, 4 * 9 * width
    assert total - others <= 5 * stream + 5 * patches + 64


@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 4, 3)], ids=["no-rows", "no-draws"])
def test_empty(shape):
    draws, rows, noise_size = shape
    head = EnergyHead(8, 5, noise_size, 2)
    latent = head(torch.zeros(rows, 8), torch.zeros(shape), backend="triton")
    assert latent.shape == (draws, rows, 5)
    latent.sum().backward()
    assert not any(value.grad.any() for value in head.parameters())


def test_no_rows_with_a_seed_each():
    head, seeds = EnergyHead(8, 5, 4, 2), torch.zeros(0, 2, dtype=torch.int64)
    hidden = torch.zeros(0, 8, requires_grad=True)
    latent = head.sample(hidden, num_samples=1, seed=seeds, backend="triton")
    assert latent.shape == (1, 0, 5)
    latent.sum().backward()
    assert hidden.grad.shape == (0, 8)


def test_what_no_kernel_takes():
    for options, message in (
        ((8, 4, 300, 1), "noise sizes up to 256, got 300"),
        ((5000, 4, 3, 1), "widths up to 4096, got 5000"),
    ):
        with torch.device("meta"):
            head = EnergyHead(*options)
        hidden = torch.zeros(1, options[0], device="meta")
        with pytest.raises(ValueError, match=message):
            head.sample(hidden, backend="triton")
    head = EnergyHead(8, 4, 3, 1).double()
    with pytest.raises(ValueError, match="no float64"):
        head.sample(torch.zeros(1, 8).double(), backend="triton")


def test_no_second_derivative(generator):
    size = (8, 4, 3, 1, 2, (1,))
    head = make_head(size, generator).float()
    hidden, drawn = (value.float() for value in make_inputs(size, generator))
    hidden.requires_grad_()
    with pytest.raises(RuntimeError, match=r"differentiable once.*reference"):
        torch.autograd.grad(head(hidden, drawn, backend="triton").sum(), hidden, create_graph=True)


def test_what_has_no_gradient_gives_none(generator):
    """As the torch backend does; autograd calls the backward pass with None."""
    size = (8, 4, 3, 1, 2, (1,))
    head = make_head(size, generator).float()
    hidden, drawn = (value.float() for value in make_inputs(size, generator))
    samples = head(hidden.requires_grad_(), drawn, backend="triton")
    Unused.apply(samples).backward()
    assert hidden.grad is None and all(weight.grad is None for weight in head.parameters())


class Unused(torch.autograd.Function):
    """Zero, which has no gradient."""

    @staticmethod
    def forward(ctx, values):
        return values.new_zeros(())

    @staticmethod
    def backward(ctx, gradient):
        return None


def test_the_operators_keep_their_contract(generator):
    """Schema, fake versions and autograd registration, by torch's own checker."""
    size = (8, 4, 3, 2, 2, (3,))
    head = make_head(size, generator).float()
    hidden, drawn = (leaf(value.float()) for value in make_inputs(size, generator))
    parameters = flatten_parameters(gather_parameters(dict(head.named_parameters())))
    source = torch.tensor([1, 0]), torch.tensor(0), 0
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    operator = torch.ops.calm_kernels.energy_head.default
    for keep in (0, 1, 2):
        arguments = (hidden, drawn, parameters, *source, 2, 1.0, keep)
        torch.library.opcheck(operator, arguments, test_utils=tests[:: 1 if keep else 2])
    with torch.no_grad():
        latent, kept = operator(*arguments)
        arguments = (latent, hidden, drawn, parameters, *source, kept, 2, 1.0, True)
        backward = torch.ops.calm_kernels.energy_head_backward.default
        torch.library.opcheck(backward, arguments, test_utils=tests[::2])


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
def test_one_graph_under_compile(recompute, generator):
    size = (8, 4, 3, 2, 2, (3,))
    head = make_head(size, generator).float()
    hidden = make_inputs(size, generator)[0].float()
    seed = torch.tensor([3, 1])

    def function(hidden):
        return head.sample(
            hidden, num_samples=2, seed=seed, recompute=recompute, backend="triton"
        ).square()

    results = []
    for call in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
        inputs = leaf(hidden)
        latent = call(inputs)
        wanted = (inputs, *head.parameters())
        results.append([latent.detach(), *torch.autograd.grad(latent.sum(), wanted)])
    torch.testing.assert_close(*results)


def forward_launches(num_blocks):
    block = ["silu_kernel", "silu_kernel", "swiglu_kernel", "norm_kernel"]
    return ["norm_kernel", "embed_kernel", *block * num_blocks, "silu_kernel"]


def backward_launches(num_blocks):
    block = ["swiglu_backward_kernel", "silu_backward_kernel", "silu_backward_kernel"]
    block += ["norm_backward_kernel"]
    last = ["silu_backward_kernel", "norm_backward_kernel"]
    return [*last, *block * num_blocks, "norm_backward_kernel", "embed_backward_kernel"]


class Launches:
    """Kernels and library matmuls that run inside the block."""

    def __init__(self, monkeypatch):
        self.kernels, self.profile = [], torch.autograd.profiler.profile()
        for module in (activation_kernels, embedding_kernels, norm_kernels):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                monkeypatch.setattr(module, name, self._watched(name, getattr(module, name)))

    def _watched(self, name, kernel):
        class Watched:
            def __getitem__(_, grid):
                self.kernels.append(name)
                return kernel[grid]

        return Watched()

    def __enter__(self):
        self.kernels.clear()
        self.profile = torch.autograd.profiler.profile()
        self.profile.__enter__()
        return self

    def __exit__(self, *error):
        self.profile.__exit__(*error)

    @property
    def matmuls(self):
        names = [event.name for event in self.profile.function_events]
        return names.count("aten::mm") + names.count("aten::addmm")


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_launches(num_blocks, generator, monkeypatch):
    """A kernel between each two matmuls; 4 matmuls a block forward and 9 backward."""
    size = (8, 4, 3, num_blocks, 2, (2,))
    head = make_head(size, generator).float()
    hidden = make_inputs(size, generator)[0].float()
    launches = Launches(monkeypatch)
    with launches:
        latent = head.sample(hidden, num_samples=2, seed=1, backend="triton")
    assert launches.kernels == forward_launches(num_blocks)
    assert launches.matmuls == 4 * num_blocks + 4
    with launches:
        latent.sum().backward()
    assert launches.kernels == backward_launches(num_blocks)
    assert launches.matmuls == 9 * num_blocks + 8


@pytest.mark.parametrize("width", [4, 64])
def test_backward_kernels_leave_their_inputs(width, generator):
    """Where threads outnumber features, one may load again what another has stored."""
    rows = torch.randn(3, 3, width, generator=generator)
    dout, matmul, stream = rows
    vector = torch.ones(width)
    before = rows.clone()
    activation_kernels.silu_backward(dout, matmul, vector, torch.empty(1, 1, width))
    norm_kernels.layer_norm_backward(
        dout, stream, None, Pair(vector, vector), torch.empty(1, 3, width), upstream=matmul
    )
    both = torch.randn(3, 2 * width, generator=generator)
    activation_kernels.swiglu_backward(dout, both, torch.ones(2 * width), torch.empty(1, 2, width))
    assert torch.equal(rows, before)
