"""A step of decoding in fixed shapes, as a GPU runs it: which kernels, and the torch backend's
text.
"""

import pytest
import torch
from model_cases import Launches, tiny_model

from calm.decoding.engine.decode_step import DecodeState, decode_step, prefill
from calm.decoding.engine.predictors import ChunkPredictor
from calm.decoding.sampling.methods import Batch, Direct
from calm_kernels import use_backend
from calm_kernels.agreeing_patch import kernels as vote_kernels
from calm_kernels.energy_head import embedding_kernels, norm_kernels, small_rows_kernels
from calm_kernels.linear_argmax import kernels as argmax_kernels

HEAD = ["norm_kernel", "embed_kernel", "silu_layer_kernel", "silu_layer_kernel",
        "swiglu_layer_kernel", "residual_layer_kernel", "silu_layer_kernel"]  # fmt: skip
ARGMAX, VOTE = ["partial_kernel", "reduce_kernel"], ["count_kernel", "choose_kernel"]
METHODS = {
    "direct": (Direct(), HEAD + ARGMAX),
    "batch": (Batch(temperature=0.5, num_samples=9, is_slotwise=False), HEAD + ARGMAX + VOTE),
}


@torch.no_grad()
def decode(model, method, backend, steps=3):
    """Tokens and how they were found, ``[steps, B, K + 5]``."""
    predictor = ChunkPredictor(model.eval(), method)
    state = DecodeState.allocate(predictor, batch_size=2, capacity=8)
    prompt = torch.randint(64, (2, 4), generator=torch.Generator().manual_seed(1))
    with use_backend(backend):
        prefill(state, prompt, [0, 0], torch.tensor([[3, 0], [4, 0]]))
        state.tokens.copy_(prompt[:, -2:])
        return torch.stack([decode_step(state) for _ in range(steps)])


@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_that_of_torch(name, monkeypatch):
    method, kernels = METHODS[name]
    model = tiny_model()
    expected = decode(model, method, "torch")
    launches = Launches(
        monkeypatch, embedding_kernels, norm_kernels, small_rows_kernels, argmax_kernels,
        vote_kernels,
    )  # fmt: skip
    actual = decode(model, method, "auto")
    assert launches.names == kernels * len(actual)
    assert torch.equal(actual, expected)
    assert len(actual[..., :2].unique()) > 2  # not one token again and again
