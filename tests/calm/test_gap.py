"""`calm experiment gap`: planted cases whose losses are known, a resumed run, what it refuses."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cli_cases import calm, error_of
from test_readout import Blocks, blocks
from tiny_models import tiny_calm

from calm.commands.gap_flags import _sources
from calm.errors import UserError
from calm.evaluation.bootstrap import ORDERS
from calm.evaluation.scores import TextScores
from calm.experiments import gap_measures, gap_report
from calm.experiments.gap import configuration_of
from calm.experiments.gap_losses import losses_of
from calm.experiments.gap_measures import GapOptions, Probe
from calm.experiments.gap_store import GapStore
from calm.experiments.latent_code import additive_share, latent_code

OPTIONS = GapOptions(num_samples=8, spreads=(0.5,), steps=20, chunks=200, slot_blocks=4)
SPAN = 10


def text_scores(offsets, terms, names=ORDERS, blocks=None):
    """Scores of a text of tokens 0, 1, 2, ... in blocks of `SPAN`."""
    offsets = torch.as_tensor(offsets)
    where = offsets // SPAN if blocks is None else torch.as_tensor(blocks)
    text = torch.arange(200, dtype=torch.int32)
    protocol = {"block_size": SPAN, "positions_are": "planted", "seed": 0}
    return TextScores(offsets, torch.as_tensor(terms).double(), where, text, protocol, names)


class Planted:
    """A probe whose draws score what is written here: the mean of Brier-n in each span of text."""

    options = replace(OPTIONS, spreads=(0.7, 0.9))

    def __init__(self, by_spread, readout):
        self._by_spread, self._readout = by_spread, readout

    def draws(self, spread=1.0):
        return self._scores(self._by_spread[spread])

    def readout(self, name):
        return self._scores(self._readout)

    def _scores(self, spans):
        offsets = torch.arange(len(spans)) * SPAN
        return text_scores(offsets, torch.tensor(spans)[:, None].expand(-1, 4))


def test_a_spread_chosen_on_one_half_is_reported_on_the_other():
    odd_loses = [0.5, 0.1] * 4  # 0.7: best where the choice is made, worst where it is confirmed
    found = losses_of(Planted({0.7: odd_loses, 0.9: [0.3] * 8, 1.0: [0.2] * 8}, [0.6] * 8))
    assert list(found.dispersion.values) == [0.7, 0.9, 1.0]
    assert found.dispersion.chosen == 0.7
    assert found.dispersion.values[0.7]["brier_lm"] == pytest.approx(50)
    assert found.dispersion.gain.difference["brier_lm"] == pytest.approx(10 - 20)
    assert found.trunk is None
    assert found.head.difference["brier_lm"] == pytest.approx(60 - 20)
    with pytest.raises(UserError, match="too short to choose a spread on one half"):
        losses_of(Planted({spread: [0.2] for spread in (0.7, 0.9, 1.0)}, [0.6]))


def test_losses_of_trunk_and_head_add_up_to_the_whole():
    probe = Planted({spread: [0.2, 0.1] * 4 for spread in (0.7, 0.9, 1.0)}, [0.3] * 8)
    everywhere = text_scores(torch.arange(80), torch.full((80, 4), 0.5))  # more than CALM's starts
    found = losses_of(probe, everywhere)
    assert found.trunk.difference["brier_lm"] == pytest.approx(50 - 30)
    assert found.trunk.difference["brier1"] + found.head.difference["brier1"] == pytest.approx(0.35)


@pytest.mark.parametrize(
    ("baseline", "readout", "draws", "said"),
    [
        ([0.5] * 8, [0.4] * 8, [0.2] * 8, "The head loses most."),
        ([0.5] * 8, [0.3] * 8, [0.2] * 8, "The trunk loses most."),
        ([0.5] * 8, [0.2, 0.4] * 4, [0.1] * 8, "cannot be told"),
        ([0.5] * 8, [0.2] * 8, [0.3] * 8, "cannot be told"),
        ([0.3] * 8, [0.4] * 8, [0.2] * 8, "The head loses most."),
        (None, [0.4] * 8, [0.2] * 8, "From a readout of the hidden states"),
    ],
    ids=["head", "trunk", "within-the-error", "readout-not-learned", "no-trunk-loss", "alone"],
)
def test_which_part_is_said_to_lose_most(baseline, readout, draws, said):
    probe = Planted(dict.fromkeys((0.7, 0.9, 1.0), draws), readout)
    found = losses_of(probe, baseline and probe._scores(baseline))
    if baseline:
        means = [sum(spans) / 8 for spans in (baseline, readout, draws)]
        expected = 100 * (means[0] - 2 * means[1] + means[2])
        assert found.trunk_minus_head.difference["brier_lm"] == pytest.approx(expected, abs=1e-4)
    page = verdict_of(found)
    assert said in page
    assert ("train it longer" in page) == (sum(draws) > sum(readout))


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ([0.5, 0.4] * 4, "is better on the other: BrierLM there minus that of 1 is 20.00 [20.00"),
        ([0.5, 0.1] * 4, "is worse on the other: BrierLM there minus that of 1 is -10.00"),
        ([0.5, 0.1, 0.5, 0.3] * 2, "is not shown to be better on the other"),
        ([0.1, 0.9] * 4, "No other noise_spread that was tried is better than 1"),
    ],
    ids=["better", "worse", "within-the-error", "none"],
)
def test_what_is_said_of_a_spread(spans, said):
    found = losses_of(Planted({0.7: spans, 0.9: [0.1] * 8, 1.0: [0.2] * 8}, [0.6] * 8))
    assert said in verdict_of(found)


def verdict_of(losses):
    latent = {"additivity": 1.0, "changed_token": 4.0, "noise": 1.0}
    return gap_report.verdict(SimpleNamespace(losses=losses, latent=latent))


def test_the_head_loses_nothing_where_its_draws_are_those_of_the_readout(monkeypatch):
    """Other draws of the same distribution: the difference is noise around 0."""
    text = blocks(40)
    probe = Probe(tiny_calm(), text, blocks(60, seed=1), OPTIONS)
    real = losses_of(probe).head
    assert real.interval["brier1"][0] > 0  # an untrained head is worse than its frequencies

    def from_readout(model, blocks, *, noise_spread, seed, **settings):
        other = Probe(model, blocks, None, replace(OPTIONS, seed=seed + 1))
        other._readouts = probe._readouts
        return other.readout("causal")

    monkeypatch.setattr(gap_measures, "score_text", from_readout)
    planted = losses_of(probe).head
    for order in ORDERS:
        low, high = planted.interval[order]
        assert low < 0 < high and high - low < 0.2


def test_slots_count_draws_that_are_the_text_and_pairs_that_agree():
    model = tiny_calm()
    probe = Probe(model, blocks(30), blocks(60, seed=1), OPTIONS)
    scores = probe.slots("causal")
    assert scores.names == tuple(f"{w}{s}" for w in ("match", "collision") for s in (1, 2, 3, 4))
    assert len(scores.terms) == 4 * 11 - 3  # of four blocks, those chunks all of whose tokens count
    ids = torch.stack([block["input_ids"] for block in blocks(4)])
    hidden = model(ids[:, :-4]).last_hidden_state.detach()
    rows = torch.arange(4 * 12).view(4, 12)[:, :11]
    draws = probe._sampler("causal").draws(hidden, None, rows)[:, 0]  # [N, S, K]
    match = (draws == ids[0, 4:].view(-1, 4)).double().mean(0)
    pairs = [(draws[i] == draws[j]).double() for i in range(8) for j in range(i)]
    expected = torch.cat([match, torch.stack(pairs).mean(0)], dim=-1)
    torch.testing.assert_close(scores.terms[:11], expected, atol=1e-6, rtol=0)


def test_bits_of_k_tokens_from_those_of_one():
    nats = torch.arange(1.0, 7).double()[:, None] * math.log(2)
    scores = text_scores([1, 2, 3, 4, 11, 12], nats, ("cross_entropy",))
    bits = gap_measures._bits_of_chunks(scores, 2)
    assert bits.offsets.tolist() == [1, 2, 3, 11]  # not across the gap
    torch.testing.assert_close(bits.terms[:, 0], torch.tensor([3.0, 5, 7, 11]).double())
    apart = text_scores([1, 2, 3, 4], nats[:4], ("cross_entropy",), blocks=[0, 0, 1, 1])
    assert gap_measures._bits_of_chunks(apart, 2).offsets.tolist() == [1, 3]


@pytest.mark.parametrize("weight", [0, 1], ids=["additive", "not-additive"])
def test_additivity_of_a_planted_code(weight, generator):
    """Tables of N(0, 1) entries: variance 11 / 12 each, and of the pairs' 121 / 144 is no sum."""
    tokens = torch.randint(12, (8000, 2), generator=generator)
    first, second, pairs = (torch.randn(n, 400, generator=generator) for n in (12, 12, 144))
    values = first[tokens[:, 0]] + second[tokens[:, 1]]
    values = values + weight * pairs[12 * tokens[:, 0] + tokens[:, 1]]
    share = additive_share(tokens, values, 12)
    expected = 1 - weight * (121 / 144) / (2 * 11 / 12 + 143 / 144)
    assert share == pytest.approx(expected, abs=0.03 if weight else 1e-6)


def test_an_additive_encoder_has_additivity_one():
    model, text = tiny_calm(), blocks(40)
    plain = latent_code(model, text)
    assert plain.additivity < 0.99 and plain.noise > 0 < plain.changed_token
    table = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))

    def additive(input_ids):
        mean = sum(table[slot][input_ids[:, slot]] for slot in range(4))[:, None]
        return torch.cat([mean, torch.full_like(mean, -1.0)], dim=-1)

    model.ae_model.encoder.forward = additive
    found = latent_code(model, text)
    assert found.additivity == pytest.approx(1, abs=1e-9)
    gaps = (table[:, :, None] - table[:, None]).norm(dim=-1)  # [slot, token, token]
    assert found.changed_token == pytest.approx(float(gaps.sum((1, 2)).mean() / 20), rel=0.1)
    assert found.others > found.changed_token
    same = Blocks({"input_ids": torch.zeros(48, dtype=torch.int64)} for _ in range(2))
    for block in same:
        block["labels"] = block["input_ids"]
    with pytest.raises(UserError, match="the text repeats one chunk"):
        latent_code(model, same)


def test_a_text_too_short_for_the_additive_fit_has_the_rest_of_the_report():
    """One chunk of its second half is in its first, the others have no token that is."""
    text = blocks(4)
    for block, tokens in zip(text, (0, 0, 3, 3), strict=True):
        block["input_ids"] = tokens + block["input_ids"] % 2
    latent = Probe(tiny_calm(), text, None, OPTIONS).latent()
    assert "additivity" not in latent and latent["changed_token"] > 0
    losses = losses_of(Planted(dict.fromkeys((0.7, 0.9, 1.0), [0.2] * 8), [0.6] * 8))
    gap = SimpleNamespace(losses=losses, latent=latent)
    reason = "the text is too short to fit a code to one half"
    assert f"cannot be told: {reason}" in gap_report.verdict(gap)
    assert f"not known: {reason}" in gap_report._latent(gap)


def test_a_head_that_ignores_the_text_is_measured_where_the_head_is():
    """The blocks that only the additive fit reads do not change what the head has removed."""
    text = blocks(40)
    few, more = (Probe(tiny_calm(), text[:n], None, OPTIONS).latent() for n in (20, 40))
    for name in ("unconditional", "predicted", "excess"):
        assert few[name] == more[name]
    assert few["others"] != more["others"]


def words(folders, *more):
    text = ("--data", folders / "text.txt", "--validation-split-percentage", 30)
    sizes = ("--block-size", 40, "--max-blocks", 4, "--quick", "--steps", 3, "--num-samples", 2)
    return ("experiment", "gap", "--model", folders / "calm", *text, *sizes, *more)


@pytest.fixture(scope="module")
def lines(folders):
    """A text of lines that differ, so that some are held out."""
    text = "".join(f"{n} the quick brown fox jumps over the lazy dog {n * n}\n" for n in range(60))
    (folders / "text.txt").write_text(text, encoding="utf-8")
    return folders


def test_a_run_that_was_killed_goes_on_and_another_configuration_is_refused(
    lines, tmp_path, capsys, monkeypatch
):
    """Of a model with a readout of its own, which is untrained: all tokens are equally likely."""
    more = ("--baseline", lines / "baseline", "--output-dir", tmp_path / "gap")
    more = (*more, "--model", lines / "readout")
    with monkeypatch.context() as patch:
        patch.setattr(Probe, "latent", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            calm(*words(lines, *more))
    assert not (tmp_path / "gap" / "report.md").exists()
    capsys.readouterr()

    def scored_again(*_, **__):
        raise AssertionError("was there already")

    for name in ("score_text", "score_draws", "train_readout", "frozen_states"):
        monkeypatch.setattr(gap_measures, name, scored_again)
    assert calm(*words(lines, *more)) == 0
    printed = capsys.readouterr().out
    assert "# Where BrierLM is lost" in printed and "token baseline" in printed
    assert (tmp_path / "gap" / "report.png").stat().st_size > 5000
    record = json.loads((tmp_path / "gap" / "results.json").read_text(encoding="utf-8"))
    found = record["gap"]
    assert set(found["scores"]) == {*found["bits"], "draws"} >= {"own", "causal", "independent"}
    assert found["bits"]["own"]["difference"]["bits"] == pytest.approx(4 * math.log2(259))
    causal = found["scores"]["causal"]["difference"]
    draws, head = found["scores"]["draws"]["difference"], found["losses"]["head"]["difference"]
    assert causal["brier1"] - draws["brier1"] == pytest.approx(head["brier1"])
    independent, joint = found["scores"]["independent"]["difference"], found["joint"]["difference"]
    assert causal["brier1"] - independent["brier1"] == pytest.approx(joint["brier1"])
    assert str(lines) not in json.dumps(record)
    message = error_of(capsys, *words(lines, *more, "--seed", 1))
    assert "results of another configuration: seed was 0, now 1" in message
    message = error_of(capsys, *words(lines, *more, "--block-size", 36))
    assert "results of another configuration: --block-size was 40, now 36" in message
    (tmp_path / "gap" / "results.json").write_text("{", encoding="utf-8")
    assert "delete the folder to start again" in error_of(capsys, *words(lines, *more))


@pytest.mark.parametrize(("before", "now"), [(2, 3), (2, None), (None, 2)])
def test_another_sampler_is_another_configuration(before, now, tmp_path):
    """Weights do not say it: a flow head of other steps draws something else."""
    model = tiny_calm("flow", sampling_steps=before)
    for _ in range(2):
        GapStore(tmp_path, configuration_of(model, OPTIONS, {}))
    model.config.sampling_steps = now
    with pytest.raises(UserError, match=f"model.sampling_steps was {before}, now {now}"):
        GapStore(tmp_path, configuration_of(model, OPTIONS, {}))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--validation-split-percentage", 0), "readouts would learn from the text that is scored"),
        (("--baseline", "calm"), "holds a CALM; pass a token baseline"),
        (("--model", "baseline"), "holds a token baseline; this study needs a CALM"),
        (("--baseline", "none"), "--baseline takes the folder of a saved model"),
        (("--max-blocks", 1), "too short to choose a spread on one half"),
    ],
    ids=["scored-text", "baseline", "model", "folder", "blocks"],
)
def test_what_it_refuses(more, message, lines, tmp_path, capsys):
    flag, value = more
    named = (flag, lines / value) if isinstance(value, str) else more
    assert message in error_of(capsys, *words(lines, "--output-dir", tmp_path / "gap", *named))


@pytest.mark.parametrize("other", ["../runs/text.txt", "t*.txt", "more.txt,text.txt", "."])
def test_a_scored_text_is_known_by_its_files(other, lines, tmp_path, capsys, monkeypatch):
    """However it is spelled; another text may be learned from."""
    folder = tmp_path / "runs"
    folder.mkdir()
    for name in ("text.txt", "more.txt"):
        (folder / name).write_bytes((lines / "text.txt").read_bytes())
    monkeypatch.chdir(folder)
    scored = ("--data", "text.txt", "--validation-split-percentage", 0)
    message = error_of(capsys, *words(lines, *scored, "--train-data", other))
    assert f"the text that is scored, {folder.resolve() / 'text.txt'}: hold" in message
    assert not _sources("more.txt", "--train-data") & _sources("text.txt", "--data")
    assert _sources("embedded:packages", "--data") == {"embedded:packages"}


@pytest.mark.parametrize(
    ("flag", "value", "least"),
    [("--num-samples", 1, 2), ("--steps", 0, 1), ("--spreads", -0.5, 0), ("--train-chunks", 0, 1)],
)
def test_numbers_out_of_range(flag, value, least, lines, capsys):
    message = error_of(capsys, *words(lines, flag, value))
    assert f"{flag} must be at least {least}, got {value}" in message
    with pytest.raises(UserError, match="num_samples must be at least 2, got 1"):
        GapOptions(num_samples=1)
