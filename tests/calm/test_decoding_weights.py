"""Generation reads the weights as they are at each call, and leaves the model as it was."""

import copy
import pickle

import pytest
import torch
from tiny_models import prompt, tiny_baseline, tiny_calm
from transformers.generation.streamers import BaseStreamer

from calm.decoding import generate

OPTIONS = {"max_new_tokens": 24, "temperature": 1.0, "seed": 0}


def flipped(weight):
    return -weight.detach().flip(0) - 0.5


def write_copy(model, name):
    with torch.no_grad():
        model.get_parameter(name).copy_(flipped(model.get_parameter(name)))


def write_data(model, name):
    """The last row or element alone, past autograd's count of versions."""
    weight = model.get_parameter(name)
    weight.data[-1] = -3.0 * weight.data[-1] - 2.0


def write_storage(model, name):
    weight = model.get_parameter(name)
    weight.data = flipped(weight)


def write_state(model, name):
    model.load_state_dict({name: flipped(model.get_parameter(name))}, strict=False)


def write_assigned_state(model, name):
    state = {name: flipped(model.get_parameter(name))}
    model.load_state_dict(state, strict=False, assign=True)


def write_optimizer(model, name):
    weight = model.get_parameter(name)
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.7).step()
    weight.grad = None


def write_module(model, name):
    """Another module in place of the one that holds the weight."""
    holder, _, _ = name.rpartition(".")
    parent, _, attribute = holder.rpartition(".")
    module = copy.deepcopy(model.get_submodule(holder))
    with torch.no_grad():
        module.get_parameter(name.rpartition(".")[2]).mul_(-1.3).sub_(0.5)
    setattr(model.get_submodule(parent), attribute, module)


WRITES = (
    write_copy, write_data, write_storage, write_state, write_assigned_state, write_optimizer,
    write_module,
)  # fmt: skip


def make_model(head):
    """A model with biases in its backbone; the weights of its norms are not what they start as."""
    biases = {"attention_bias": True, "mlp_bias": True}
    model = (
        tiny_baseline(vocab_size=5, **biases) if head == "baseline" else tiny_calm(head, **biases)
    )
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    return model


def names_read(model):
    """The weights that generation reads: all but those of the frozen encoder's own layers."""
    skipped = ("ae_model.encoder.",)
    tied = "ae_model.encoder.embed_tokens.weight"
    return [
        name for name, _ in model.named_parameters() if name == tied or not name.startswith(skipped)
    ]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@pytest.mark.parametrize("head", ["energy", "baseline"])
def test_a_write_of_any_kind_to_any_weight_is_seen(head, write):
    """The text after a write is that of a fresh model with the same weights."""
    model, ids = make_model(head), prompt(1, 8)
    text, changes = model.generate(ids, **OPTIONS), 0
    for name in names_read(model):
        if write is write_module and name.startswith("ae_model.encoder"):
            continue  # the decoder is tied to the embedding module itself
        write(model, name)
        fresh = make_model(head)  # one that has never generated
        fresh.load_state_dict(model.state_dict())
        before, text = text, model.generate(ids, **OPTIONS)
        assert torch.equal(text, fresh.generate(ids, **OPTIONS)), name
        changes += not torch.equal(text, before)
    assert changes > len(names_read(model)) / 4  # the writes do change texts


def test_a_streamer_may_write_to_its_tokens():
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


def test_results_can_be_used_in_training():
    """Decoding runs in inference mode, whose tensors autograd refuses to save."""
    model, ids = tiny_calm(), prompt(1, 8)
    result = generate(model, ids, max_new_tokens=8, seed=0, return_details=True)
    tensors = [value for value in vars(result).values() if torch.is_tensor(value)]
    assert tensors and not any(value.is_inference() for value in tensors)
    model.train()(result.sequences, labels=result.sequences, seed=0).loss.backward()
    assert model.embed_proj[0].weight.grad is not None
    again = generate(model.eval(), ids, max_new_tokens=8, seed=0)
    assert torch.equal(again, result.sequences)


def test_a_model_that_generated_is_copied_and_saved_as_before(tmp_path):
    model, ids = tiny_calm(), prompt(1, 8)
    result = generate(model, ids, max_new_tokens=8, seed=0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(generate(other, ids, max_new_tokens=8, seed=0), result)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(generate(again, ids, max_new_tokens=8, seed=0), result)
