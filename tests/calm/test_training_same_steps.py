"""What changes no step: layers computed again in the backward pass, a loss compiled as a whole.

How micro-batches and processes change none: `test_training_trainer.py`, `test_training_sharded.py`.
"""

import inspect

import pytest
import tiny
import torch
from training_cases import MODELS, history, train


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing")  # no name fits all versions
@pytest.mark.parametrize("name", ["energy", "terms", "baseline"])
def test_gradient_checkpointing(name, tmp_path):
    """By the flag of the program: losses, norms and weights to the bit."""
    settings = {"max_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    plain = train(MODELS[name](), tmp_path, **settings)
    saving = train(MODELS[name](), tmp_path, gradient_checkpointing=True, **settings)
    for measure in ("loss", "grad_norm"):
        assert history(saving, measure) == history(plain, measure), measure
    pairs = zip(saving.model.parameters(), plain.model.parameters(), strict=True)
    assert all(left.equal(right) for left, right in pairs)


@pytest.mark.filterwarnings("ignore:::torch")  # of its compiler about itself
@pytest.mark.parametrize(
    "name",
    ["baseline", *(pytest.param(n, marks=pytest.mark.long) for n in ("autoencoder", "terms"))],
)
def test_a_loss_that_is_compiled_as_a_whole(name):
    """With our operations in it: the same loss and gradients, graph breaks or not."""
    torch._dynamo.reset()
    model, ids = MODELS[name]().train(), tiny.tokens(chunks=4)
    draws = {"seed": 1} if "seed" in inspect.signature(model.forward).parameters else {}
    weights = [weight for weight in model.parameters() if weight.requires_grad]

    def loss(ids):
        return model(ids, labels=ids, **draws).loss

    steps = []
    for call in (torch.compile(loss, backend="aot_eager"), loss):
        value = call(ids)
        steps.append([value, *torch.autograd.grad(value, weights)])
    torch.testing.assert_close(*steps)
