"""Slots: texts that come and go say what they say alone."""

import pytest
import torch
from tiny_models import calm_with_readout, prompt, tiny_baseline, tiny_calm

from calm.decoding import generate
from calm.decoding.generation import make_predictor
from calm.decoding.sampling.seeds import sequence_seeds
from calm.decoding.slots import SlotBatch
from calm.decoding.text.prompt import PromptFormat
from calm.decoding.text.transcript import Transcript

CPU = torch.device("cpu")
FIELDS = {"pad_token_id": 0, "max_position_embeddings": 32}
ONE_DRAW = {"temperature": 1.0}
METHODS = [
    ONE_DRAW,
    {"temperature": 0.5, "num_samples": 16},
    {"temperature": 0.4, "num_samples": 16, "method": "exact"},
    {"temperature": 0.5, "num_samples": 16, "method": "medoid"},
    {"temperature": 0.5, "method": "noise_scale"},
]
# Prompts of a chunk, of several, and such as end within a chunk.
LENGTHS = (4, 8, 5, 11, 16)


def make_models():
    return {
        "energy": (tiny_calm(**FIELDS), METHODS),
        "flow": (tiny_calm("flow", **FIELDS), METHODS[:2]),
        "baseline": (tiny_baseline(vocab_size=5, **FIELDS), [ONE_DRAW, {"temperature": 0.5}]),
        "readout": (
            calm_with_readout(vocab_size=5, **FIELDS),
            [{"method": "readout", "temperature": 0.8}],
        ),
    }


class Text:
    """A prompt with its seed and method, and what was said so far."""

    def __init__(self, model, index, sampling, new_tokens):
        self.predictor = make_predictor(model, **sampling)
        self.ids = prompt(LENGTHS[index % len(LENGTHS)], seed=index).tolist()
        size = self.predictor.patch_size
        (self.prompt,) = PromptFormat(
            patch_size=size, context=32, start_token_id=None, pad_token_id=0,
            alignment="condition", max_new_tokens=new_tokens, max_length=None, truncate=False,
        ).apply([self.ids])  # fmt: skip
        self.seed, self.sampling = index, sampling
        self.transcript = Transcript(
            [self.prompt], ends=(), keeps_tail=False, stops=None, streamer=None
        )

    def begin(self, batch):
        self.slot = batch.free_slot
        seed = sequence_seeds([self.seed], 1, CPU)
        self.add(batch.begin(self.slot, self.prompt, self.predictor, seed))

    def add(self, record):
        self.transcript.append(0, record)

    @property
    def records(self):
        return self.transcript.records[0]


def run(batch, texts, arrivals):
    """Let text i come at step `arrivals[i]`, or when a slot is free, and go when it is done."""
    waiting = sorted(zip(arrivals, texts, strict=True), key=lambda pair: pair[0])
    active, step = [], 0
    while waiting or active:
        while waiting and waiting[0][0] <= step and batch.free_slot is not None:
            active.append(waiting.pop(0)[1])
            active[-1].begin(batch)
        for text in [text for text in active if text.transcript.is_complete]:
            batch.free(text.slot)
            active.remove(text)
        if active:
            for slot, record in batch.step().items():
                next(text for text in active if text.slot == slot).add(record)
        step += 1


@pytest.mark.parametrize("kind", ["energy", "flow", "baseline", "readout"])
def test_a_text_is_the_same_in_any_company(kind):
    model, methods = make_models()[kind]
    batch = SlotBatch(make_predictor(model, **methods[0]), num_slots=3, capacity=32)
    number = len(methods) + 4

    def make(index):
        return Text(model, index, methods[index % len(methods)], 6 + 3 * (index % 4))

    texts = [make(index) for index in range(number)]
    run(batch, texts, [2 * (index % 3) for index in range(number)])
    for index, text in enumerate(texts):
        alone = make(index)
        run(batch, [alone], [0])
        assert alone.records == text.records, index
        new_tokens = text.prompt.budget
        expected = generate(
            model, [text.ids], max_new_tokens=new_tokens, seed=[index], **text.sampling
        )
        assert text.transcript.sequences() == expected.tolist(), index
    assert batch.used == []


def test_an_infinite_text_disturbs_neither_its_neighbours_nor_its_successor():
    model = tiny_calm(**FIELDS)
    batch = SlotBatch(make_predictor(model, **ONE_DRAW), num_slots=2, capacity=32)
    texts = [Text(model, index, ONE_DRAW, 12) for index in (0, 1, 0)]
    for text in texts[:2]:
        text.begin(batch)
    batch._state.cache.keys[:, 0] = torch.nan
    batch._state.cache.values[:, 0] = torch.inf
    records = batch.step()
    assert not records[0].is_finite and records[1].is_finite
    batch.free(0)
    texts[2].begin(batch)
    again = Text(model, 0, ONE_DRAW, 12)
    fresh = SlotBatch(make_predictor(model, **ONE_DRAW), num_slots=2, capacity=32)
    again.begin(fresh)
    assert texts[2].records == again.records
    for _ in range(2):
        assert batch.step()[0] == fresh.step()[0]


def test_empty_slots_never_fill_up():
    model = tiny_calm(**FIELDS)
    batch = SlotBatch(make_predictor(model, **ONE_DRAW), num_slots=2, capacity=8)
    for index in range(4):
        text = Text(model, index, ONE_DRAW, 12)
        text.begin(batch)
        for _ in range(3):
            batch.step()
        batch.free(text.slot)
    assert batch._state.cache.lengths.tolist() == [0, 0]
