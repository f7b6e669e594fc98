"""Readouts of frozen hidden states: what they compute, what they draw, what they learn from."""

import math

import pytest
import torch
from tiny_models import tiny_calm

from calm.decoding.generation import make_predictor
from calm.errors import UserError
from calm.evaluation.readout_bits import readout_bits
from calm.evaluation.samplers import ReadoutSampler
from calm.evaluation.scores import score_draws
from calm.evaluation.stored_scores import load_scores, save_scores
from calm.experiments.readout import FrozenStates, Readout, frozen_states, train_readout
from calm_kernels.noise import as_seed

VOCAB, SIZE, WIDTH = 5, 4, 32


class Blocks(list):
    """Blocks with what `PackedBlocks` says of them."""

    block_size = 48


def blocks(count=6, seed=0):
    """Random tokens; in the second block a masked begin chunk, and padding that cuts a chunk."""
    ids = torch.randint(VOCAB, (count, 48), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[1, 42:] = -100
    labels[1, 20:24] = -100
    return Blocks({"input_ids": i, "labels": t} for i, t in zip(ids, labels, strict=True))


def readout(is_causal, seed=0):
    """One that is far from uniform."""
    torch.manual_seed(seed)
    made = Readout(WIDTH, SIZE, VOCAB, is_causal=is_causal).requires_grad_(False)
    made.output.weight.mul_(6)
    return made.eval()


def test_states_are_those_before_the_chunks_they_are_paired_with():
    model, text = tiny_calm(), blocks()
    states = frozen_states(model, text, 1000)
    assert len(states) == 6 * 11 - 2  # no first chunk, no chunk that is masked altogether
    hidden = model(text[1]["input_ids"][None]).last_hidden_state[0].detach()
    at = 11 + 4  # the second block's; its begin chunk, the fifth, is not there
    torch.testing.assert_close(states.hidden[at], hidden[5])
    assert states.tokens[at].tolist() == text[1]["input_ids"][24:28].tolist()
    assert states.labels[11 + 8].tolist() == [*text[1]["input_ids"][40:42].tolist(), -100, -100]
    few = frozen_states(model, text, 12)  # two blocks, which lie far apart
    assert len(few) == 22
    assert few.tokens[11].tolist() == text[3]["input_ids"][4:8].tolist()


def test_bits_are_the_cross_entropy_on_frozen_states():
    model, made, text = tiny_calm(), readout(True), blocks()
    scores = readout_bits(model, made, text)
    states = frozen_states(model, text, 1000)
    is_whole = (states.labels >= 0).all(-1)
    logits = made.output(made.features(states.hidden, states.tokens))[is_whole]
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), states.tokens[is_whole].ravel())
    assert len(scores.terms) == int(is_whole.sum())
    assert float(scores.terms.mean()) == pytest.approx(SIZE * float(nats) / math.log(2), rel=1e-5)
    whole = FrozenStates(
        *(part[is_whole] for part in (states.hidden, states.tokens, states.labels))
    )
    assert float(made.loss(whole)) == pytest.approx(float(nats), rel=1e-5)
    for block in text:
        block["labels"] = block["labels"].clone()
        block["labels"][::SIZE] = -100
    with pytest.raises(UserError, match="no chunk of the text is whole"):
        readout_bits(model, made, text)


@pytest.mark.parametrize("is_causal", [False, True], ids=["independent", "causal"])
def test_draws_have_the_distribution_of_the_readout(is_causal, generator):
    count, made = 4000, readout(is_causal)
    hidden = torch.randn(1, 1, WIDTH, generator=generator)
    predictor = make_predictor(tiny_calm(), method="direct", temperature=1.0)
    sampler = ReadoutSampler(predictor, count, False, as_seed(1, "cpu"), made)
    draws = sampler.draws(hidden, None, torch.tensor([[7]]))[:, 0, 0]  # [N, K]
    every = torch.cartesian_prod(*[torch.arange(VOCAB)] * SIZE)
    features = made.features(hidden[0].expand(len(every), -1), every)
    chances = made.output(features).log_softmax(-1).gather(-1, every[..., None]).sum((1, 2)).exp()
    likely = chances.topk(5)
    shares = (draws == every[likely.indices][:, None]).all(-1).double().mean(-1)
    errors = (likely.values * (1 - likely.values) / count).sqrt()
    assert ((shares - likely.values).abs() < 4 * errors).all()
    assert torch.equal(draws, sampler.draws(hidden, None, torch.tensor([[7]]))[:, 0, 0])
    assert not torch.equal(draws, sampler.draws(hidden, None, torch.tensor([[8]]))[:, 0, 0])


def test_a_slot_causal_readout_learns_what_independent_slots_cannot(generator):
    first = torch.randint(VOCAB, (4000, 1), generator=generator)
    tokens = (first + torch.arange(SIZE)) % VOCAB
    states = FrozenStates(torch.randn(4000, WIDTH, generator=generator), tokens, tokens)
    before = torch.random.get_rng_state()
    losses = {
        is_causal: float(train_readout(states, VOCAB, is_causal=is_causal, steps=60, seed=0)
                         .loss(states))
        for is_causal in (False, True)
    }  # fmt: skip
    assert losses[False] == pytest.approx(math.log(VOCAB), abs=0.08)
    assert losses[True] == pytest.approx(math.log(VOCAB) / SIZE, abs=0.08)
    assert torch.equal(before, torch.random.get_rng_state())
    nothing = FrozenStates(*(part[:0] for part in (states.hidden, tokens, tokens)))
    with pytest.raises(UserError, match="has no text to learn from"):
        train_readout(nothing, VOCAB, is_causal=True, steps=1, seed=0)


@pytest.mark.parametrize("patch_size", [2, 4])
def test_scores_come_back_from_their_file_as_they_were(patch_size, tmp_path):
    model = tiny_calm(patch_size=patch_size)
    torch.manual_seed(0)
    made = Readout(WIDTH, patch_size, VOCAB, is_causal=True)
    predictor = make_predictor(model, method="direct", temperature=1.0)
    sampler = ReadoutSampler(predictor, 4, False, as_seed(0, "cpu"), made)
    scores = score_draws(sampler, blocks(), settings={"seed": 0})
    save_scores(scores, tmp_path / "scores.safetensors")
    loaded = load_scores(tmp_path / "scores.safetensors")
    for name in ("offsets", "terms", "blocks", "text"):
        assert torch.equal(getattr(scores, name), getattr(loaded, name))
    assert loaded.protocol == scores.protocol and loaded.names == scores.names
    (tmp_path / "scores.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="delete it to score again"):
        load_scores(tmp_path / "scores.safetensors")
