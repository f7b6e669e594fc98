"""Packing loses nothing, streamed or cached, whatever the sizes; separators; bad block sizes."""

import datasets
import numpy as np
import pytest
import torch
from tokenizers import processors
from torch.utils.data import DataLoader

from calm.data.blocks import check_block_size, collate, pack
from calm.data.encoding import document_separator
from calm.data.packing import PackedBlocks, pack_documents
from calm.data.stream import PackedStream
from calm.data.tokenization import align_documents, tokenize_documents
from calm.data.tokenizer import byte_tokenizer
from calm.errors import UserError
from calm.labels import IGNORE_INDEX

TOKENIZER = byte_tokenizer()
EOS, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id


@pytest.fixture(autouse=True)
def quiet_datasets():
    datasets.disable_progress_bars()


def random_texts(count, seed=0):
    random = np.random.default_rng(seed)
    lengths = random.integers(0, 40, count)
    return ["".join(map(chr, random.integers(97, 123, length))) for length in lengths]


def table(texts):
    return datasets.Dataset.from_dict({"text": texts})


def expected_tokens(texts):
    return [token for text in texts if text for token in (*text.encode(), EOS)]


def unpacked(blocks):
    """Tokens of the blocks without padding, and how many blocks are not full."""
    blocks = list(blocks)
    kept = [block["input_ids"][block["labels"] != IGNORE_INDEX] for block in blocks]
    return np.concatenate(kept).tolist(), sum(
        len(tokens) < len(blocks[0]["labels"]) for tokens in kept
    )


SIZES = [(1, 8), (3, 8), (50, 8), (50, 64), (50, 4096), (200, 12)]


@pytest.mark.parametrize(("count", "block_size"), SIZES)
class TestNothingIsLost:
    def test_table_and_stream_hold_every_token_once(self, count, block_size):
        texts = ["first", *random_texts(count)]
        packed = {}
        for name, documents in {"table": table(texts), "stream": stream(texts)}.items():
            blocks = list(pack_documents(documents, TOKENIZER, block_size=block_size, patch_size=4))
            tokens, unfilled = unpacked(blocks)
            assert tokens == expected_tokens(texts)
            assert unfilled == (len(tokens) % block_size > 0)
            assert all(len(block["input_ids"]) == block_size for block in blocks)
            packed[name] = blocks
        for left, right in zip(packed["table"], packed["stream"], strict=True):
            assert all(np.array_equal(left[key], right[key]) for key in ("input_ids", "labels"))

    def test_padding_is_at_the_end_and_does_not_count(self, count, block_size):
        blocks = list(pack([np.arange(count * 7)], block_size, PAD))
        last = blocks[-1]
        filled = count * 7 - (len(blocks) - 1) * block_size
        assert (last["input_ids"][filled:] == PAD).all() and (last["labels"][filled:] == -100).all()
        assert (last["input_ids"][:filled] == last["labels"][:filled]).all()


def stream(texts, shards=1):
    return table(texts).to_iterable_dataset(num_shards=shards)


def test_pieces_of_a_table_written_by_several_processes_are_one_sequence():
    texts = random_texts(60)
    whole = PackedBlocks(tokenize_documents(table(texts), TOKENIZER), 16, PAD)
    pieces = datasets.concatenate_datasets(
        [table(texts[:7]), table(texts[7:31]), table(texts[31:])]
    )
    parts = PackedBlocks(tokenize_documents(pieces, TOKENIZER), 16, PAD)
    parts._chunks, parts._ends = split_chunks(parts._chunks)
    assert len(parts._chunks) > 1 and parts.data_hash() == whole.data_hash()
    assert unpacked(parts[i] for i in range(len(parts))) == unpacked(
        whole[i] for i in range(len(whole))
    )


def split_chunks(chunks):
    pieces = [piece for chunk in chunks for piece in np.array_split(chunk, [5, 6, 40])]
    return pieces, np.cumsum([len(piece) for piece in pieces])


class TestRecord:
    def test_hash_names_the_tokens_not_the_blocks(self):
        tokenized = tokenize_documents(table(random_texts(20)), TOKENIZER)
        other = tokenize_documents(table(random_texts(20, seed=1)), TOKENIZER)
        assert (
            PackedBlocks(tokenized, 8, PAD).data_hash()
            == PackedBlocks(tokenized, 32, 0).data_hash()
        )
        assert (
            PackedBlocks(tokenized, 8, PAD).data_hash() != PackedBlocks(other, 8, PAD).data_hash()
        )
        assert (
            PackedBlocks(tokenized, 8, PAD, 2).data_hash()
            != PackedBlocks(tokenized, 8, PAD).data_hash()
        )

    def test_tokens_per_character(self):
        blocks = PackedBlocks(tokenize_documents(table(["äää", "bb"]), TOKENIZER), 4, PAD)
        assert blocks.tokens_per_character == pytest.approx((6 + 1 + 2 + 1) / 5)


class TestLimits:
    def test_first_blocks_only(self):
        texts = random_texts(50)
        options = {"block_size": 16, "patch_size": 4, "max_blocks": 3}
        cached = pack_documents(table(texts), TOKENIZER, **options)
        streamed = pack_documents(stream(texts), TOKENIZER, **options)
        assert len(cached) == len(list(streamed)) == 3
        assert unpacked(cached[i] for i in range(3))[0] == expected_tokens(texts)[:48]
        assert unpacked(streamed)[0] == expected_tokens(texts)[:48]

    def test_repeated_stream_goes_round_and_drops_nothing(self):
        texts = random_texts(10)
        blocks = pack_documents(stream(texts), TOKENIZER, block_size=16, patch_size=4, repeat=True)
        one_pass = -(-len(expected_tokens(texts)) // 16)
        twice = [block for _, block in zip(range(2 * one_pass), blocks, strict=False)]
        assert unpacked(twice)[0] == 2 * expected_tokens(texts)

    def test_index_out_of_range(self):
        blocks = PackedBlocks(tokenize_documents(table(["abc"]), TOKENIZER), 8, PAD)
        with pytest.raises(IndexError):
            blocks[1]


class TestSeparators:
    def test_end_token_where_the_tokenizer_adds_none(self):
        assert document_separator(TOKENIZER) == EOS

    def test_the_tokenizer_s_own_begin_token_stays_and_an_end_token_follows(self):
        tokenizer = byte_tokenizer()
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, 256)]
        )
        assert document_separator(tokenizer) == EOS
        tokenized = tokenize_documents(table(["ab", "", "c"]), tokenizer)
        assert tokenized["input_ids"] == [[256, 97, 98, EOS], [], [256, 99, EOS]]


START = TOKENIZER.bos_token_id


def aligned(texts, patch_size):
    """Chunks of every document, and whether each of their tokens has a label."""
    tokens, has_label = [], []
    for text in filter(None, texts):
        fill = -(len(text) + 1) % patch_size
        tokens += [START] * patch_size + [*text.encode(), EOS] + [EOS] * fill
        has_label += [False] * patch_size + [True] * (len(text) + 1) + [False] * fill
    return tokens, has_label


class TestStartChunks:
    @pytest.mark.parametrize(("patch_size", "block_size"), [(1, 8), (3, 12), (4, 64), (8, 4096)])
    def test_every_document_gets_chunks_of_its_own(self, patch_size, block_size):
        texts = ["first", "", *random_texts(50)]
        tokens, has_label = aligned(texts, patch_size)
        options = {"block_size": block_size, "patch_size": patch_size, "start_token_id": START}
        for documents in (table(texts), stream(texts)):
            batch = collate(list(pack_documents(documents, TOKENIZER, **options)))
            inputs, labels = (batch[name].flatten() for name in ("input_ids", "labels"))
            assert inputs[: len(tokens)].tolist() == tokens
            assert (labels[: len(tokens)] >= 0).tolist() == has_label
            assert torch.equal(labels[labels >= 0], inputs[labels >= 0])
            assert (inputs[len(tokens) :] == PAD).all() and (labels[len(tokens) :] == -100).all()

    def test_blocks_hold_the_same_text_as_without(self):
        texts = random_texts(60)
        options = {"block_size": 16, "patch_size": 4}
        kept = [
            unpacked(list(pack_documents(table(texts), TOKENIZER, **options, start_token_id=start)))
            for start in (None, START)
        ]
        assert kept[0][0] == kept[1][0]

    def test_the_tokenizer_s_own_tokens_stay(self):
        tokenized = datasets.Dataset.from_dict(
            {"input_ids": [[START, 7, 8, EOS], [9, EOS], []], "num_characters": [2, 1, 0]}
        )
        result = align_documents(tokenized, start_token_id=START, end_token_id=EOS, patch_size=2)
        before = [~START, ~START]
        assert result["input_ids"][:] == [[*before, START, 7, 8, EOS], [*before, 9, EOS], []]
        assert result["num_characters"][:] == [2, 1, 0]

    def test_the_cache_knows_one_layout_from_another(self):
        tokenized = tokenize_documents(table(["abc", "defgh"]), TOKENIZER)
        layouts = [(START, EOS, 4), (START, EOS, 2), (1, EOS, 4), (START, 2, 4)]
        names = ("start_token_id", "end_token_id", "patch_size")
        tables = [
            align_documents(tokenized, **dict(zip(names, row, strict=True))) for row in layouts
        ]
        fingerprints = {tokenized._fingerprint, *(table._fingerprint for table in tables)}
        assert len(fingerprints) == 5
        again = align_documents(tokenized, **dict(zip(names, layouts[0], strict=True)))
        assert again._fingerprint == tables[0]._fingerprint


class TestLoading:
    def test_collated_batch(self):
        blocks = PackedBlocks(tokenize_documents(table(random_texts(9)), TOKENIZER), 8, PAD)
        batch = collate([blocks[0], blocks[1]])
        assert batch["input_ids"].shape == batch["labels"].shape == (2, 8)
        assert batch["labels"].dtype == torch.int64

    @pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
    @pytest.mark.parametrize(("workers", "shards"), [(0, 1), (2, 2), (2, 1)])
    def test_loader_workers_share_a_stream_without_loss(self, workers, shards):
        texts = random_texts(40)
        blocks = pack_documents(stream(texts, shards), TOKENIZER, block_size=8, patch_size=4)
        loader = DataLoader(blocks, batch_size=2, num_workers=workers, collate_fn=collate)
        seen = torch.cat([batch["labels"].flatten() for batch in loader])
        assert sorted(seen[seen >= 0].tolist()) == sorted(expected_tokens(texts))


class TestBadInput:
    @pytest.mark.parametrize(("block_size", "suggested"), [(29, 28), (4, 8), (0, 8), (127, 128)])
    def test_block_size(self, block_size, suggested):
        with pytest.raises(UserError, match=rf"multiple of patch_size .K=4. .*try {suggested}"):
            check_block_size(block_size, 4)

    def test_no_data_left(self):
        for documents in (table(["", ""]), stream([""])):
            with pytest.raises(UserError, match="no data left after packing"):
                list(pack_documents(documents, TOKENIZER, block_size=8, patch_size=4))
        with pytest.raises(UserError, match=r"no data left .* max_samples is 0"):
            pack_documents(table(["abc"]), TOKENIZER, block_size=8, patch_size=4, max_blocks=0)


def test_classes_say_what_they_are():
    assert isinstance(
        pack_documents(stream(["a"]), TOKENIZER, block_size=8, patch_size=4), PackedStream
    )
