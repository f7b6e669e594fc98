"""One order of a stream's blocks, however many processes, workers and lanes read it."""

import itertools

import datasets
import numpy as np
import pytest
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader
from training_cases import make_trainer, tiny_baseline

from calm.data import stream as stream_module
from calm.data.blocks import collate
from calm.data.packing import pack_documents
from calm.data.tokenizer import byte_tokenizer
from calm.errors import UserError
from calm.training.flags.arguments import CALMTrainingArguments

TOKENIZER = byte_tokenizer()
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def texts(count=30):
    """Each names itself in every word, so that a block tells where it is from."""
    lengths = np.random.default_rng(0).integers(1, 30, count)
    return [f"{number:03d} " * length for number, length in enumerate(lengths)]


def rows_of(shards):
    for shard in shards:
        for text in shard:
            yield {"text": text}


def blocks_of(documents, shards=2, **options):
    parts = [documents[part::shards] for part in range(shards)]
    stream = datasets.IterableDataset.from_generator(rows_of, gen_kwargs={"shards": parts})
    return pack_documents(stream, TOKENIZER, block_size=16, patch_size=4, **options)


def seen(blocks, batch, workers=0, processes=1, process=0, steps=10):
    """Blocks of the first batches of a process, as accelerate prepares its loader."""
    blocks.deal(batch, processes, process)
    shard = IterableDatasetShard(blocks, batch, False, processes, process)
    loader = DataLoader(
        shard if processes > 1 else blocks, batch, num_workers=workers, collate_fn=collate
    )
    return [tuple(map(tuple, b["input_ids"].tolist())) for b in itertools.islice(loader, steps)]


@pytest.mark.parametrize("lanes", [1, 3, 8])
def test_processes_and_workers_see_one_order(lanes):
    """Over several passes of a text of two files; a batch of two processes is theirs in turn."""
    blocks = blocks_of(texts(), repeat=True, lanes=lanes)
    expected = [block for batch in seen(blocks, 4, steps=60) for block in batch]
    for workers in (1, 2):
        assert seen(blocks, 4, workers, steps=60) == seen(blocks, 4, steps=60)
    for workers in (0, 2):
        parts = [seen(blocks, 2, workers, 2, process, steps=60) for process in (0, 1)]
        dealt = [block for turn in zip(*parts, strict=True) for part in turn for block in part]
        assert dealt == expected


@pytest.mark.parametrize("lanes", [1, 4])
def test_each_pass_holds_the_whole_text(lanes):
    documents, held = texts(), [[] for _ in range(lanes)]
    blocks = blocks_of(documents, repeat=True, lanes=lanes)
    total = 3 * sum(len(text) + 1 for text in documents)
    for number, block in enumerate(blocks):
        held[number % lanes] += block["labels"][block["labels"] >= 0].tolist()
        if sum(map(len, held)) >= total:
            break
    words = " ".join(bytes(t for t in lane if t < 256).decode() for lane in held).split()
    for text in documents:  # lanes are not at the same place of the text
        times = len(text.split())
        assert 2 * times <= words.count(text[:3]) <= 4 * times, text[:3]


def test_an_end_is_the_same_with_workers():
    """Without repetition: every block once, in order, the last batch not full."""
    blocks = blocks_of(texts())
    whole = seen(blocks, 4, steps=None)
    assert len(whole[-1]) < 4
    for workers in (1, 2):
        assert seen(blocks, 4, workers, steps=None) == whole


@pytest.mark.parametrize(("dispatch", "expected"), [(None, (2, 1, 0)), (False, (2, 2, 1))])
def test_the_trainer_deals_a_stream_to_processes(dispatch, expected, monkeypatch, tmp_path):
    """Or to none, if the first reads for all."""
    monkeypatch.setattr(CALMTrainingArguments, "world_size", 2)
    monkeypatch.setattr(CALMTrainingArguments, "process_index", 1)
    settings = {"accelerator_config": {"dispatch_batches": dispatch}}
    trainer = make_trainer(tiny_baseline(), tmp_path, per_device_train_batch_size=2, **settings)
    trainer.train_dataset = blocks = blocks_of(texts(), repeat=True, lanes=4)
    trainer.get_train_dataloader()
    assert (blocks.batch_size, blocks.processes, blocks.process) == expected


def test_evaluation_scores_the_same_batches_with_workers(tmp_path):
    """Draws are addressed by the place of a sequence, so another order would be another score."""
    settings, found = {"per_device_eval_batch_size": 4}, []
    for workers in (0, 2):
        trainer = make_trainer(
            tiny_baseline(), tmp_path, dataloader_num_workers=workers, **settings
        )
        loader = trainer.get_eval_dataloader(blocks_of(texts()))
        found.append([batch["input_ids"].tolist() for batch in loader])
    assert found[0] == found[1]


def test_a_worker_tokenizes_its_lanes_alone(monkeypatch):
    """Two processes with two workers and a batch of 2: a quarter of the text each, by 8 lanes."""
    encoded = []

    class Worker:
        num_workers = 2

        def __init__(self, index):
            self.id = index

    def tokenize(documents, tokenizer):
        own = list(documents)
        encoded.extend(own)
        return (np.zeros(len(text), np.int32) for text in own)

    monkeypatch.setattr(stream_module, "tokenize_stream", tokenize)
    documents = texts(200)
    blocks = blocks_of(documents, repeat=True, lanes=8)
    for process, worker in itertools.product((0, 1), (0, 1)):
        monkeypatch.setattr(stream_module, "get_worker_info", lambda index=worker: Worker(index))
        blocks.deal(2, 2, process)
        before = sum(map(len, encoded))
        next(block for block in blocks if block is not None)
        share = (sum(map(len, encoded)) - before) / sum(map(len, documents))
        assert share == pytest.approx(0.25, abs=0.02)
    assert sorted(encoded) == sorted(documents)


def test_what_lanes_cannot_do():
    with pytest.raises(UserError, match=r"stream_lanes=9, but the stream holds fewer documents"):
        list(itertools.islice(blocks_of(texts(8), repeat=True, lanes=9), 9))
    with pytest.raises(UserError, match="stream_lanes=2 has no first blocks"):
        blocks_of(texts(), repeat=True, lanes=2, max_blocks=5)
    with pytest.raises(ValueError, match="need repeat"):
        blocks_of(texts(), lanes=2)
    first = blocks_of(texts(), repeat=True, max_blocks=3)
    assert seen(first, 3, steps=2)[0] == seen(first, 3, steps=2)[1]
