"""The kernels of the draws: the tokens of torch, two launches, logits of any dtype and stride."""

import pytest
import torch
from model_cases import Launches
from torch._subclasses.fake_tensor import FakeTensorMode

from calm_kernels import softmax_draws, tuning
from calm_kernels.softmax_draws import kernels

LAUNCHES = ["split_kernel", "draw_kernel"]


@pytest.fixture(autouse=True)
def splits_are_small(monkeypatch):
    """16 tokens, so that a small vocabulary has several."""
    row = {tuning.MANY: tuning.Launch(block_vocab=16)}
    monkeypatch.setitem(tuning.TABLE, ("softmax_draws", tuning.DEFAULT), row)


@pytest.mark.parametrize("vocab_size", [1, 16, 17, 100])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 5.0])
def test_the_tokens_of_torch(vocab_size, temperature, monkeypatch, generator):
    """Of bfloat16 logits with rows between them, drawn and given."""
    logits = 4 * torch.randn(6, vocab_size + 3, generator=generator)
    logits = logits.bfloat16()[::2, 1 : vocab_size + 1]
    launches = Launches(monkeypatch, kernels)
    uniforms = torch.rand(3, 2, dtype=torch.float64, generator=generator)
    uniforms[0] = torch.tensor([0.0, 1 - 2**-24])
    for options in ({"uniforms": uniforms}, {"seed": torch.tensor([[1, 0], [2**40, 3], [5, 5]])}):
        options |= {"temperature": temperature, "num_draws": 2}
        found = softmax_draws(logits, **options, backend="triton")
        expected = softmax_draws(logits, **options, backend="torch")
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert launches.names == LAUNCHES * 2


def test_a_draw_falls_into_every_split(generator):
    """Chances of tokens, and of splits, from 1e-12 to nearly 1."""
    logits = 8 * torch.randn(1, 200, generator=generator)
    uniforms = torch.linspace(0, 1 - 2**-24, 40, dtype=torch.float64)[None]
    for values in (logits, -logits, torch.zeros(1, 200)):
        found = softmax_draws(values, uniforms, backend="triton")[0]
        assert torch.equal(found, softmax_draws(values, uniforms, backend="reference")[0])
    assert len(found.unique()) == 40


@pytest.mark.filterwarnings("ignore:overflow")  # NumPy's, of 1e30 / 1e-20
def test_what_is_not_finite():
    logits = torch.zeros(5, 40)
    logits[1, 39], logits[2, 0] = float("inf"), float("nan")
    logits[3], logits[4, 20] = -float("inf"), 1e30
    for temperature in (1e-20, 0.0):
        tokens, is_finite = softmax_draws(logits, temperature=temperature, seed=1, backend="triton")
        assert is_finite.tolist() == [True, False, False, False, temperature == 0.0]
        assert ((tokens >= 0) & (tokens < 40)).all()


def test_one_operator_for_modes(monkeypatch):
    """Schema and fake version, by torch's own checker; no row is no launch."""
    logits, uniforms = torch.zeros(2, 20), torch.zeros(2, 3, dtype=torch.float64)
    operator = torch.ops.calm_kernels.softmax_draws.default
    for arguments in ((uniforms, None, 3), (None, torch.tensor([1, 0]), 1)):
        torch.library.opcheck(
            operator, (logits, *arguments, 6, 1.0), test_utils=("test_schema", "test_faketensor")
        )
    with FakeTensorMode(allow_non_fake_inputs=True):
        tokens, is_finite = softmax_draws(logits, uniforms, backend="triton")
        assert tokens.shape == (2, 3) and is_finite.shape == (2,)
    launches = Launches(monkeypatch, kernels)
    assert softmax_draws(logits[:0], uniforms[:0], backend="triton")[0].shape == (0, 3)
    assert not launches.names
