"""How likely continuations are: chances that sum to one, whatever the place where they begin."""

import math

import pytest
import torch
from test_decoding_readout import calm_with_readout
from tiny_models import tiny_baseline, tiny_calm

from calm.errors import UserError
from calm.evaluation.likelihood import continuation_likelihoods
from calm.evaluation.readout_bits import readout_bits

VOCAB = 7


MODELS = {
    "baseline": lambda: tiny_baseline(vocab_size=VOCAB),
    "readout": lambda: calm_with_readout(vocab_size=VOCAB),
    "with a start chunk": lambda: calm_with_readout(
        vocab_size=VOCAB, has_start_patch=True, bos_token_id=1
    ),
}


def chances(model, context, length):
    """Of every continuation of `length` tokens."""
    every = torch.cartesian_prod(*[torch.arange(VOCAB)] * length).view(-1, length).tolist()
    found = continuation_likelihoods(model, [(context, tokens) for tokens in every])
    return every, found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [4, 5, 7])
def test_chances_of_all_continuations_sum_to_one(name, length):
    """Wherever the context ends within its chunk, and across the border of chunks."""
    every, found = chances(MODELS[name](), list(range(VOCAB))[:length], 2)
    total = sum(math.exp(likelihood.log_probability) for likelihood in found)
    assert total == pytest.approx(1, abs=1e-5)
    # The greedy one begins with the likeliest first token, which exactly one continuation does.
    assert sum(likelihood.is_greedy for likelihood in found) == 1
    firsts = torch.zeros(VOCAB)
    for tokens, likelihood in zip(every, found, strict=True):
        firsts[tokens[0]] += math.exp(likelihood.log_probability)
    greedy = next(t for t, likelihood in zip(every, found, strict=True) if likelihood.is_greedy)
    assert greedy[0] == int(firsts.argmax())


@torch.no_grad()
def test_the_baseline_agrees_with_its_logits():
    model = tiny_baseline(vocab_size=VOCAB)
    ids = torch.tensor([[1, 5, 2, 6, 3, 0]])
    expected = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    pairs = [(ids[0, :end].tolist(), ids[0, end:].tolist()) for end in (1, 3, 5)]
    for end, found in zip((1, 3, 5), continuation_likelihoods(model, pairs), strict=True):
        assert found.log_probability == pytest.approx(float(expected[end - 1 :].sum()), abs=1e-5)


def test_a_readout_agrees_with_its_bits():
    model = calm_with_readout(vocab_size=VOCAB)
    ids = torch.randint(VOCAB, (12,), generator=torch.Generator().manual_seed(2)).tolist()
    (found,) = continuation_likelihoods(model, [(ids[:4], ids[4:])])
    bits = readout_bits(model, model.slot_readout(), [ids]).terms.sum()
    assert -found.log_probability / math.log(2) == pytest.approx(float(bits), abs=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_batches_change_nothing(name):
    model = MODELS[name]()
    pairs = [([1, 2, 3, 4, 5][:n], [2, 6, 1][:m]) for n, m in ((4, 1), (5, 3), (4, 2))]
    alone = [continuation_likelihoods(model, [pair])[0] for pair in pairs]
    for one, two in zip(alone, continuation_likelihoods(model, pairs, batch_size=2), strict=True):
        assert one.log_probability == pytest.approx(two.log_probability, abs=1e-5)
        assert one.is_greedy == two.is_greedy


@pytest.mark.parametrize("name", MODELS)
def test_a_long_context_loses_whole_chunks_at_its_beginning(name):
    model = MODELS[name]()
    size = getattr(model, "patch_size", 1)
    room = model.config.max_position_embeddings * size
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(VOCAB, (room + 3 * size,), generator=generator).tolist()
    (whole,) = continuation_likelihoods(model, [(text[:-2], text[-2:])])
    kept = text[3 * size :]  # as many tokens as fit, without a start chunk
    (cut,) = continuation_likelihoods(model, [(kept[:-2], kept[-2:])])
    (other,) = continuation_likelihoods(model, [(kept[size:-2], kept[-2:])])
    assert whole == cut
    assert whole != other


@pytest.mark.parametrize(
    ("model", "pair", "message"),
    [
        (tiny_calm(vocab_size=VOCAB), ([1] * 4, [2]), "without likelihood"),
        (tiny_baseline(vocab_size=VOCAB), ([1], []), "at least one token, got none"),
        (tiny_baseline(vocab_size=VOCAB), ([], [1]), "at least 1 tokens before it"),
        (calm_with_readout(vocab_size=VOCAB), ([1, 2, 3], [1]), "at least 4 tokens before it"),
    ],
)
def test_bad_input(model, pair, message):
    with pytest.raises(UserError, match=message):
        continuation_likelihoods(model, [pair])
