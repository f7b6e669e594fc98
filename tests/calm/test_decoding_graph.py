"""Captured steps without a GPU: which are kept, and what their memory stands up to."""

import pytest
import torch
from tiny_models import prompt, tiny_calm

from calm.decoding import generate, graph, loop, warmup
from calm.decoding.engine.backbone import CachedBackbone
from calm.decoding.engine.decode_step import State, decode_step, prefill
from calm.decoding.engine.predictors import make_predictor

OPTIONS = {"max_new_tokens": 40, "temperature": 1.0, "seed": [1, 2]}


class SingleSteps:
    """A `CapturedStep` that runs its step operation by operation."""

    capacities: list[int]

    def __init__(self, state):
        self.state = state

    @classmethod
    def capture(cls, state):
        cls.capacities.append(state.cache.capacity)
        return cls(state)

    def replay(self):
        return decode_step(self.state)


@pytest.fixture
def capacities(monkeypatch):
    """Those of the steps that are captured, in order."""
    SingleSteps.capacities = []
    monkeypatch.setattr(graph, "CapturedStep", SingleSteps)
    monkeypatch.setattr(loop, "_is_captured", lambda predictor: True)
    return SingleSteps.capacities


def test_a_captured_step_serves_all_shorter_texts(capacities):
    model = tiny_calm(max_position_embeddings=2048)
    warmup(model, batch_size=2, max_length=1000, temperature=1.0)
    assert capacities == [256]
    text = generate(model, prompt(2, 8), **OPTIONS)
    assert capacities == [256]
    generate(model, prompt(1, 8), **{**OPTIONS, "seed": 1})
    generate(model, prompt(2, 8), **{**OPTIONS, "max_new_tokens": 1200})
    assert capacities == [256, 64, 512]
    fresh = tiny_calm(max_position_embeddings=2048)
    assert torch.equal(generate(fresh, prompt(2, 8), **OPTIONS), text)


def test_the_step_of_a_text_does_not_depend_on_earlier_texts(capacities):
    model = tiny_calm(max_position_embeddings=2048)
    for new_tokens in (1200, 40, 300, 1200, 40):  # 302, 12, 77 chunks, and again
        generate(model, prompt(2, 8), **{**OPTIONS, "max_new_tokens": new_tokens})
    assert capacities == [512, 64, 128]


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_what_was_captured_in_inference_mode_serves_outside(capacities, first):
    model = tiny_calm()
    with first():
        expected = generate(model, prompt(2, 8), **OPTIONS)
    assert torch.equal(generate(model, prompt(2, 8), **OPTIONS), expected)
    with torch.inference_mode():
        assert torch.equal(generate(model, prompt(2, 8), **OPTIONS), expected)
    assert capacities == [64]


def test_autocast_changes_nothing(capacities):
    model = tiny_calm()
    expected = generate(model, prompt(2, 8), **OPTIONS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert warmup(model, max_length=48, temperature=1.0) > 0
        assert torch.equal(generate(model, prompt(2, 8), **OPTIONS), expected)


@torch.no_grad()
def test_an_earlier_text_that_was_not_finite_leaves_no_trace():
    predictor = make_predictor(
        tiny_calm(), method="batch", temperature=1.0, num_samples=8, noise_scale=1.0, max_draws=None
    )
    state = State.allocate(
        predictor, CachedBackbone(predictor.backbone), batch_size=2, capacity=64, is_fixed=True
    )
    seed = torch.tensor([[1, 0], [2, 0]])
    records = []
    for value in (0.0, torch.nan):
        state.cache.keys.fill_(value)
        state.cache.values.fill_(value)
        state.tokens.zero_()
        prefill(state, prompt(2, 8), [0, 1], seed)
        records.append(torch.stack([decode_step(state) for _ in range(3)]))
    assert torch.equal(*records)
