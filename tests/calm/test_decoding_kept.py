"""What a model keeps between calls, and what generation leaves as it was."""

import copy
import pickle

import pytest
import torch
from tiny_models import prompt, tiny_calm
from transformers.generation.streamers import BaseStreamer

from calm.decoding import generate, loop
from calm.decoding.engine.cuda_graph import arranged
from calm.decoding.engine.predictors import make_predictor


def change_in_place(model):
    with torch.no_grad():
        model.transformer.layers[0].mlp.up_proj.weight.mul_(-2.0)


def change_data(model):
    for parameter in model.transformer.parameters():
        parameter.data.copy_(parameter.data.flip(0))


def change_data_behind(model):
    for parameter in (*model.generative_head.parameters(), *model.embed_proj.parameters()):
        parameter.data.mul_(-1.7)


def change_tensors(model):
    weights = {name: tensor.flip(0) for name, tensor in model.transformer.state_dict().items()}
    model.transformer.load_state_dict(weights, assign=True)


def test_a_streamer_may_do_what_it_likes():
    class Writer(BaseStreamer):
        def put(self, value):
            value.add_(1)
            assert not value.is_inference()

        def end(self):
            pass

    model, ids = tiny_calm(), prompt(1, 8)
    options = {"max_new_tokens": 12, "seed": 0}
    shown = generate(model, ids, streamer=Writer(), **options)
    assert torch.equal(shown, generate(model, ids, **options))


def test_an_interrupt_gives_the_threads_back(monkeypatch):
    def interrupt(*_):
        torch.set_num_threads(1)  # as in the middle of `one_thread`
        raise KeyboardInterrupt

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(loop, "decode_step", interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            generate(tiny_calm(), prompt(1, 8), max_new_tokens=12, seed=0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_results_are_of_use_in_training():
    """Decoding runs in inference mode, whose tensors autograd refuses to save."""
    model, ids = tiny_calm(), prompt(1, 8)
    result = generate(model, ids, max_new_tokens=8, seed=0, return_details=True)
    tensors = [value for value in vars(result).values() if torch.is_tensor(value)]
    assert tensors and not any(value.is_inference() for value in tensors)
    model.train()(result.sequences, labels=result.sequences, seed=0).loss.backward()
    assert model.embed_proj[0].weight.grad is not None
    again = generate(model.eval(), ids, max_new_tokens=8, seed=0)
    assert torch.equal(again, result.sequences)


@pytest.mark.parametrize(
    "change", [change_in_place, change_data, change_data_behind, change_tensors]
)
def test_changed_weights_are_noticed(change):
    model, ids = tiny_calm(), prompt(1, 8)
    options = {"max_new_tokens": 40, "temperature": 1.0, "seed": 0}
    before = generate(model, ids, **options)
    predictor = make_predictor(
        model, method="batch", temperature=1.0, num_samples=8, noise_scale=1.0, max_draws=None
    )
    kept = arranged(predictor)
    assert arranged(predictor) is kept
    change(model)
    after = generate(model, ids, **options)
    assert not torch.equal(after, before)
    fresh = tiny_calm()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(after, generate(fresh, ids, **options))


def test_a_model_that_generated_is_copied_and_pickled_without_what_it_kept(tmp_path):
    model, ids = tiny_calm(), prompt(1, 8)
    result = generate(model, ids, max_new_tokens=8, seed=0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other._kept_for_decoding.arranged is None
        assert torch.equal(generate(other, ids, max_new_tokens=8, seed=0), result)
    model.save_pretrained(tmp_path)
    assert not any("kept" in name for name in model.state_dict())
