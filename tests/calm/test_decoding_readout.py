"""Chunks that a CALM's own readout draws, and how likely it finds a text."""

import math

import pytest
import torch
from tiny_models import Recorder, calm_with_readout, prompt, tiny_baseline, tiny_calm

from calm import EnergyTransformer
from calm.decoding.engine.decode_step import DecodeState, decode_step
from calm.decoding.generation import make_predictor
from calm.errors import UserError
from calm.evaluation.brier import brier_sums
from calm.evaluation.readout_bits import readout_bits
from calm.evaluation.samplers import make_sampler
from calm.evaluation.scores import score_text
from calm.experiments.readout import Readout
from calm_kernels.noise import as_seed

VOCAB, SIZE, COUNT = 3, 4, 4000
KINDS = ["independent", "causal"]


def every_chunk(vocab_size=VOCAB):
    return torch.cartesian_prod(*[torch.arange(vocab_size)] * SIZE)


@torch.no_grad()
def log_chances(model, ids, temperature=1.0):
    """Of every chunk after the one prompt `ids`, by teacher forcing; ``[V^K, K]``, slot by slot."""
    hidden, every = model(ids).last_hidden_state[0, -1:], every_chunk()
    readout = model.slot_readout()
    logits = readout.logits(readout.features(hidden.expand(len(every), -1), every)) / temperature
    return logits.log_softmax(-1).gather(-1, every[..., None])[..., 0]


def check_shares(drawn, chances):
    """Chunks ``[COUNT, K]`` have these probabilities, within four standard errors."""
    code = (drawn * VOCAB ** torch.arange(SIZE - 1, -1, -1)).sum(-1)
    shares = torch.bincount(code, minlength=VOCAB**SIZE) / len(drawn)
    errors = (chances * (1 - chances) / len(drawn)).sqrt()
    assert ((shares - chances).abs() < 4 * errors + 1e-3).all()


def probe_readout(kind):
    """That of `calm experiment gap`, which learns on frozen states."""
    torch.manual_seed(1)
    return Readout(32, SIZE, VOCAB, is_causal=kind == "causal").eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "make", [probe_readout, lambda kind: calm_with_readout(kind).slot_readout()],
    ids=["probe", "model"],
)  # fmt: skip
def test_a_slot_sees_the_tokens_before_it_alone(make, kind, generator):
    made, hidden = make(kind), torch.randn(3, 32, generator=generator)
    tokens = torch.randint(VOCAB, (3, SIZE), generator=generator)
    features = made.features(hidden, tokens)
    for slot in range(SIZE):
        torch.testing.assert_close(made.slot(hidden, tokens[:, :slot]), features[:, slot])
        changed = tokens.clone()
        changed[:, slot] = (tokens[:, slot] + 1) % VOCAB
        differs = (made.features(hidden, changed) - features).abs().amax((0, 2)) > 1e-6
        assert differs.tolist() == [kind == "causal" and later > slot for later in range(SIZE)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.5])
def test_draws_have_the_distribution_of_tempered_tokens(kind, temperature):
    model, ids = calm_with_readout(kind), prompt(1, 8, vocab_size=VOCAB)
    found = model.generate(
        ids.expand(COUNT, -1),
        max_new_tokens=SIZE,
        method="readout",
        temperature=temperature,
        seed=0,
    )
    chances = log_chances(model, ids, temperature).sum(-1).exp()
    assert chances.sum().item() == pytest.approx(1, abs=1e-5)
    assert chances.max() > 4 / VOCAB**SIZE  # far from uniform
    check_shares(found[:, 8:], chances)


@pytest.mark.parametrize("given", [1, 3])
def test_given_tokens_condition_those_after_them_exactly(given):
    model, ids = calm_with_readout(), prompt(1, 8 + given, vocab_size=VOCAB)
    found = model.generate(
        ids.expand(COUNT, -1), max_new_tokens=SIZE - given, method="readout", temperature=1.0,
        seed=0, return_details=True,
    )  # fmt: skip
    assert torch.equal(found.sequences[:, : 8 + given], ids.expand(COUNT, -1))
    assert not found.fallbacks.any() and (found.draws == 1).all()
    log_chance = log_chances(model, ids[:, :8])
    fits = (every_chunk()[:, :given] == ids[0, 8:]).all(-1)
    check_shares(found.sequences[:, 8:], torch.where(fits, log_chance[:, given:].sum(-1).exp(), 0))


def test_a_text_does_not_depend_on_its_batch():
    """Prompts of several lengths, some of which end inside a chunk."""
    model = calm_with_readout(vocab_size=7, pad_token_id=6)
    prompts = [prompt(length).tolist() for length in (4, 6, 9, 11)]
    options = {"method": "readout", "temperature": 0.7, "max_new_tokens": 13}
    together = model.generate(prompts, seed=[3, 4, 5, 6], return_details=True, **options)
    for row, (ids, seed) in enumerate(zip(prompts, (3, 4, 5, 6), strict=True)):
        alone = model.generate([ids], seed=seed, **options)[0]
        length = len(ids) + 13
        assert torch.equal(alone, together.sequences[row, :length])
    assert together.new_tokens.tolist() == [13] * 4
    other = model.generate(prompts, seed=[7, 8, 9, 10], **options)
    assert not torch.equal(other, together.sequences)


@torch.no_grad()
def test_a_captured_step_does_not_synchronise():
    """Tensors without data: reading one, or a shape that depends on data, raises."""
    model = calm_with_readout().to("meta")
    predictor = make_predictor(model, method="readout", temperature=0.7)
    assert predictor.is_capturable
    state = DecodeState.allocate(predictor, batch_size=2, capacity=64, is_fixed=True)
    assert decode_step(state).shape == (2, SIZE + 5)
    given, length = torch.zeros(2, SIZE, dtype=torch.int64, device="meta"), state.seed[:, 0]
    hidden = torch.zeros(2, 32, device="meta")
    assert predictor.complete(hidden, given, length, state.seed).tokens.shape == (2, SIZE)


def test_it_streams_what_it_returns():
    model, streamer = calm_with_readout(), Recorder()
    ids = prompt(1, 6, vocab_size=VOCAB)
    options = {"method": "readout", "temperature": 1.0, "max_new_tokens": 9, "seed": 2}
    found = model.generate(ids, streamer=streamer, **options)
    received = torch.cat([part.reshape(-1) for part in streamer.received])
    assert received.tolist() == found[0].tolist() and streamer.has_ended


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_generates_the_same(kind, tmp_path):
    model, ids = calm_with_readout(kind), prompt(2, 8, vocab_size=VOCAB)
    model.save_pretrained(tmp_path)
    loaded = EnergyTransformer.from_pretrained(tmp_path)
    assert loaded.config.token_readout == kind
    options = {"method": "readout", "temperature": 1.0, "max_new_tokens": 12, "seed": 5}
    assert torch.equal(model.generate(ids, **options), loaded.generate(ids, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be finite and at least 0, got -0.1"),
        ({"temperature": math.inf}, "temperature must be finite and at least 0, got inf"),
        ({"noise_scale": 0.5}, "noise_scale must be 1 for method 'readout'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(UserError, match=message):
        calm_with_readout().generate([[1] * 4], max_new_tokens=4, method="readout", **options)


@pytest.mark.parametrize("model", [calm_with_readout(), tiny_baseline()], ids=["calm", "baseline"])
def test_temperature_0_takes_the_likeliest_token(model):
    options = {"method": "readout", "max_new_tokens": 12}
    cold = model.generate([[1] * 4], temperature=1e-4, seed=1, **options)
    assert torch.equal(model.generate([[1] * 4], temperature=0.0, seed=2, **options), cold)


def test_without_a_readout_it_says_how_to_get_one():
    with pytest.raises(UserError, match=r"no readout of tokens: .*keep_token_readout=true"):
        make_predictor(tiny_calm(), method="readout", temperature=1.0)


def test_logits_that_overflow_are_reported():
    model = calm_with_readout()
    with torch.no_grad():
        model.token_readout.slots.weight.fill_(3e38)
    with pytest.raises(UserError, match="latents or logits that are not finite"):
        model.generate([[1] * 4], max_new_tokens=4, method="readout")
    with pytest.raises(UserError, match="logits are not finite"):
        score_text(model, prompt(1, 12, vocab_size=VOCAB), method="readout")


def test_the_baseline_is_a_readout_of_its_own():
    model, ids = tiny_baseline(), [[1, 2]]
    options = {"max_new_tokens": 9, "temperature": 0.5, "seed": 3}
    assert torch.equal(
        model.generate(ids, method="readout", **options), model.generate(ids, **options)
    )


class TestEvaluation:
    def test_bits_are_those_of_the_chunks_probability(self):
        model = calm_with_readout()
        text = prompt(2, 20, vocab_size=VOCAB)
        found = readout_bits(model, model.slot_readout(), text).terms[:, 0]
        expected = []
        for row in text:
            for start in range(4, 20, 4):
                which = (every_chunk() == row[start : start + 4]).all(-1)
                nats = log_chances(model, row[None, :start])[which].sum()
                expected.append(-float(nats) / math.log(2))
        assert found.tolist() == pytest.approx(expected, rel=1e-5)

    def test_scores_are_those_of_its_draws(self):
        """2 P(y) - Σ P², of chunks that can be enumerated."""
        model, ids = calm_with_readout(), prompt(1, 8, vocab_size=VOCAB)
        sampler = make_sampler(
            model, num_samples=COUNT, brier_draws=None, noise_scale=1.0, method="readout",
            seed=as_seed(0, "cpu"),
        )  # fmt: skip
        with torch.no_grad():
            sums, counts = brier_sums(sampler, ids, None)
        chances = log_chances(model, ids[:, :4]).sum(-1).exp()
        which = (every_chunk() == ids[0, 4:]).all(-1)
        expected = 2 * chances[which] - chances.square().sum()
        assert counts.tolist() == [1]
        assert sums[0, 3].item() == pytest.approx(expected.item(), abs=0.02)

    def test_its_noise_cannot_be_spread(self):
        with pytest.raises(UserError, match="noise_spread must be 1 for the readout of a"):
            score_text(
                calm_with_readout(), prompt(1, 12, vocab_size=VOCAB), method="readout",
                noise_spread=0.5,
            )  # fmt: skip
