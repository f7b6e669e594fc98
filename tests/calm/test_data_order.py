"""The order of prepared blocks: each once an epoch, whoever reads, from any place; mixtures."""

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard
from prepared_cases import blocks_of, prepare, write_jsonl
from torch.utils.data import BatchSampler, DataLoader
from training_cases import make_trainer, tiny_baseline

from calm.data.blocks import collate
from calm.data.mixture import epoch_shares, parse_sources, parse_weights
from calm.data.order import EpochBatches, ShuffledBlocks, permuted
from calm.errors import UserError
from calm.training.flags.arguments import CALMTrainingArguments

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def numbered(folder, count, name="a", **settings):
    """A text whose blocks of 4 tokens are its documents, which name themselves: ``000``, end."""
    path = write_jsonl(folder / f"{name}.jsonl", [f"{number:03d}" for number in range(count)])
    return prepare(folder / f"out-{name}", path, size=40, **settings)


def number_of(row):
    return int(bytes(map(int, row[:3])).decode())


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000])
def test_a_permutation_takes_every_place_once(size):
    orders = [[permuted(place, size, key) for place in range(size)] for key in ("a", "b")]
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert size < 7 or orders[0] != orders[1] != list(range(size))


def test_permutations_are_even():
    """Each of 8 places goes to each of 8 as often as to any other, over 4000 keys."""
    counts = np.zeros((8, 8))
    for key in range(4000):
        for place in range(8):
            counts[place, permuted(place, 8, str(key))] += 1
    statistic = float(((counts - 500) ** 2 / 500).sum())
    assert 20 < statistic < 95  # chi-squared with 49 degrees of freedom: 1 in 10,000 beyond


def loaded(blocks, batch, workers, processes, epoch, skip=0):
    """What every process reads in an epoch, from batch `skip` on."""
    for process in range(processes):
        batches = blocks.batches(batch, processes, process)
        batches.set_epoch(epoch)
        loader = DataLoader(blocks, batch_sampler=batches, num_workers=workers, collate_fn=collate)
        loader = skip_first_batches(loader, skip) if skip else loader
        yield [[number_of(row) for row in each["input_ids"].tolist()] for each in loader]


def dealt(parts):
    """The sequences of all processes in the order of the run."""
    turns = itertools.zip_longest(*parts, fillvalue=())
    return [number for turn in turns for part in turn for number in part]


def test_ranks_and_workers_read_each_token_once_an_epoch(tmp_path):
    blocks = ShuffledBlocks(blocks_of(numbered(tmp_path, 24), block_size=4), seed=3)
    epochs = []
    for epoch in (0, 1):
        expected = dealt(loaded(blocks, 2, 0, 1, epoch))
        assert sorted(expected) == list(range(24)) != expected
        for workers, processes in ((0, 2), (0, 3)) if epoch else ((2, 1), (1, 2)):
            assert dealt(loaded(blocks, 2, workers, processes, epoch)) == expected
        for workers, processes in ((2, 1), (0, 2)):  # from the middle on
            found = dealt(loaded(blocks, 2, workers, processes, epoch, skip=3))
            assert found == expected[3 * 2 * processes :]
        epochs.append(expected)
    assert epochs[0] != epochs[1]
    assert dealt(loaded(ShuffledBlocks(blocks.blocks, 4), 2, 0, 1, 0)) != epochs[0]


def test_shuffled_blocks_are_those_of_the_text(tmp_path):
    blocks = blocks_of(numbered(tmp_path, 24), block_size=4, max_blocks=10)
    shuffled = ShuffledBlocks(blocks, 0)
    found = [number_of(shuffled[place]["input_ids"]) for place in range(30)]
    for epoch in range(3):
        assert sorted(found[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert [number_of(blocks[i]["input_ids"]) for i in range(10)] == list(range(10))
    with pytest.raises(IndexError):
        blocks[10]


def test_a_mixture_keeps_its_weights_and_goes_through_every_text(tmp_path):
    words = {
        "web": write_jsonl(tmp_path / "web.jsonl", [f"{n:03d}" for n in range(40)]),
        "code": write_jsonl(tmp_path / "code.jsonl", [f"{n:03d}" for n in range(100, 106)]),
    }
    prepared = prepare(tmp_path / "out", words, mixture="web=0.7,code=0.3")
    assert [source.weight for source in prepared.description.sources] == ["7/10", "3/10"]
    shuffled = ShuffledBlocks(blocks_of(prepared, block_size=4), seed=0)
    assert len(shuffled) == 20  # code: 6 = 0.3 * 20, all of it
    places = [number_of(shuffled[place]["input_ids"]) for place in range(60)]
    for epoch in range(3):
        own = places[epoch * 20 : epoch * 20 + 20]
        assert len(set(own)) == 20 and sum(number >= 100 for number in own) == 6
    assert max(Counter(places[:40]).values()) <= 2
    assert {number for number in places if number < 100} == set(range(40))  # 42 draws: all of web
    half = blocks_of(prepared, block_size=4, max_blocks=10)
    assert half.shares == [7, 3] and half.sizes == [40, 6]
    # A run that goes on with another share would read another order: it has to find out.
    assert half.data_hash() != blocks_of(prepared, block_size=4).data_hash()
    same = blocks_of(prepared, block_size=4, max_blocks=10)
    assert half.data_hash() == same.data_hash()
    whole = prepare(tmp_path / "whole", words)
    assert len(blocks_of(whole, block_size=4)) == 46
    tiny = prepare(tmp_path / "tiny", words, mixture="web=0.99,code=0.01")
    with pytest.raises(UserError, match="source code: an epoch of the mixture holds no block"):
        blocks_of(tiny, block_size=8)


def test_shares_are_exact():
    thirds = [Fraction(1, 3)] * 3
    assert epoch_shares([9, 12, 30], thirds) == [9, 9, 9]
    assert epoch_shares([10, 10], [Fraction("0.7"), Fraction("0.3")]) == [10, 4]
    assert epoch_shares([7, 10], [Fraction("0.7"), Fraction("0.3")]) == [7, 3]
    assert epoch_shares([7, 10], None) == [7, 10] and epoch_shares([7, 10], None, 9) == [7, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("web=0.7,code=0.2", r"weights must sum to 1, got 0\.9"),
        ("web=1.5,code=-0.5", "weights must be positive, got code=-0.5"),
        ("web=1,code=0", "weights must be positive, got code=0"),
        ("web=nan,code=1", "a positive number to each source"),
        ("web,code=1", "a positive number to each source"),
        ("web=1", "no weight for code"),
        ("web=0.5,code=0.3,wiki=0.2", "wiki is no source"),
        ("web=0.5,web=0.5", "web is given twice"),
    ],
)
def test_weights_that_make_no_mixture(text, message):
    with pytest.raises(UserError, match=message):
        parse_weights(text, ["web", "code"])


def test_weights_and_sources():
    assert parse_weights("a=1/3, b=2/3", ["b", "a"]) == {"b": Fraction(2, 3), "a": Fraction(1, 3)}
    assert sum(parse_weights("a=0.333333,b=0.666667", ["a", "b"]).values()) == 1
    assert parse_sources(["a=x=y.txt", "b=c,d"]) == {"a": "x=y.txt", "b": "c,d"}
    for words in (["a"], ["=x"], ["a="], ["a b=x"], ["a/b=x"], ["a=x", "a=y"]):
        with pytest.raises(UserError, match="source"):
            parse_sources(words)


@pytest.mark.parametrize(("length", "batch"), [(24, 2), (23, 2), (25, 4), (3, 4), (7, 1)])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_are_those_of_accelerate(length, batch, processes, drop_last):
    plain = BatchSampler(range(length), batch, drop_last)
    for process in range(processes):
        expected = list(BatchSamplerShard(plain, processes, process) if processes > 1 else plain)
        ours = EpochBatches(length, batch, processes, process, drop_last=drop_last)
        assert [list(each) for each in ours] == expected and len(ours) == len(expected)
        ours.set_epoch(2)
        assert [[place - 2 * length for place in each] for each in ours] == expected


@pytest.mark.parametrize("processes", [1, 2])
def test_the_trainer_resumes_in_the_middle_of_a_later_epoch(processes, tmp_path, monkeypatch):
    monkeypatch.setattr(CALMTrainingArguments, "world_size", processes)
    monkeypatch.setattr(CALMTrainingArguments, "process_index", processes - 1)
    data = ShuffledBlocks(blocks_of(numbered(tmp_path, 24), block_size=4), seed=3)

    def order(skip):
        settings = {"per_device_train_batch_size": 2}
        trainer = make_trainer(tiny_baseline(), tmp_path, data=data, **settings)
        loader = trainer.get_train_dataloader()
        assert len(loader) == 12 // processes
        trainer.callback_handler.train_dataloader = loader
        trainer.state.epoch = 2 + skip / len(loader)
        trainer.callback_handler.on_epoch_begin(trainer.args, trainer.state, trainer.control)
        loader = skip_first_batches(loader, skip) if skip else loader
        loader.set_epoch(2)
        return [number_of(row) for batch in loader for row in batch["input_ids"].tolist()]

    own = order(skip=0)
    *_, last = loaded(data, 2, 0, processes, 2)
    assert own == [number for batch in last for number in batch]
    assert order(skip=2) == own[4:]


def test_a_late_step_is_found_at_once():
    """Whatever the number of processes: a batch costs its two ends."""
    batches = EpochBatches(10**12, 4, 512, 7, drop_last=False)
    batches.set_epoch(3)
    found = next(itertools.islice(iter(batches), 100_000, None))
    assert list(found) == [3 * 10**12 + (100_000 * 512 + 7) * 4 + row for row in range(4)]
