"""Captured steps without a GPU: which are kept, and what their memory stands up to."""

import copy
import pickle

import pytest
import torch
from tiny_models import prompt, tiny_calm

from calm.decoding import generate, loop, warmup
from calm.decoding.engine import cuda_graph
from calm.decoding.engine.decode_step import DecodeState, decode_step, prefill
from calm.decoding.sampling.methods import build_method
from calm_kernels.backend import use_overlap

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
    monkeypatch.setattr(cuda_graph, "CapturedStep", SingleSteps)
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


def test_a_graph_keeps_how_its_kernels_follow_each_other(capacities):
    model, options = tiny_calm(), {**OPTIONS, "max_new_tokens": 4}
    for is_on in (False, True, False, True):
        with use_overlap(is_on):
            generate(model, prompt(2, 8), **options)
    assert capacities == [64, 64]


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_a_step_captured_in_inference_mode_works_outside_of_it(capacities, first):
    model = tiny_calm()
    with first():
        expected = generate(model, prompt(2, 8), **OPTIONS)
    assert torch.equal(generate(model, prompt(2, 8), **OPTIONS), expected)
    with torch.inference_mode():
        assert torch.equal(generate(model, prompt(2, 8), **OPTIONS), expected)
    assert capacities == [64]


def test_a_graph_is_captured_again_when_its_signature_changes(capacities):
    """A write in place is read by the next replay; another tensor, module or hook is not."""
    model, ids = tiny_calm(), prompt(2, 8)
    layer = model.transformer.layers[1]

    def replace_module():
        layer.mlp = copy.deepcopy(layer.mlp)

    def move_weight():
        layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data.clone()

    def replace_parameter():
        layer.mlp.up_proj.weight = torch.nn.Parameter(layer.mlp.up_proj.weight.detach().clone())

    def add_hook():
        layer.register_forward_hook(lambda *_: None)

    def spread_noise():
        model.config.tempered_spread = [[0.5, 0.4]]

    generate(model, ids, **OPTIONS)
    layer.mlp.up_proj.weight.data[1:].mul_(-2.0)
    model.load_state_dict(model.state_dict())
    generate(model, ids, **OPTIONS)
    assert capacities == [64]
    moves = (replace_module, move_weight, replace_parameter, add_hook, spread_noise)
    for count, move in enumerate(moves, 2):
        move()
        generate(model, ids, **OPTIONS)
        assert len(capacities) == count, move.__name__
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(tiny_calm()))):
        generate(other, ids, **OPTIONS)
    assert len(capacities) == count + 2


def test_autocast_changes_nothing(capacities):
    model = tiny_calm()
    expected = generate(model, prompt(2, 8), **OPTIONS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert warmup(model, max_length=48, temperature=1.0) > 0
        assert torch.equal(generate(model, prompt(2, 8), **OPTIONS), expected)


@torch.no_grad()
def test_an_earlier_text_that_was_not_finite_leaves_no_trace():
    predictor = tiny_calm().make_predictor(build_method(temperature=1.0), 1.0)
    state = DecodeState.allocate(predictor, batch_size=2, capacity=64, is_fixed=True)
    seed = torch.tensor([[1, 0], [2, 0]])
    records = []
    for value in (0.0, torch.nan):
        state.cache.keys.fill_(value)
        state.cache.values.fill_(value)
        state.tokens.zero_()
        prefill(state, prompt(2, 8), [2, 1], seed)
        records.append(torch.stack([decode_step(state) for _ in range(3)]))
    assert torch.equal(*records)
