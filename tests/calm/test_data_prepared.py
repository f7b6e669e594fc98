"""Prepared text: equal to text that is packed on the spot, whatever the files, parts and kills."""

import gzip
import json
import shutil

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from prepared_cases import TOKENIZER, blocks_of, prepare, random_texts, write_jsonl

from calm.data import preparing
from calm.data.corpus import is_held_out
from calm.data.manifest import DESCRIPTION, UNFINISHED, is_prepared, read_description
from calm.data.packing import pack_documents
from calm.data.prepared import PreparedText
from calm.data.reading import Damage, read_documents, read_lines
from calm.data.shards import ENDS, TOKENS, Layout, ShardWriter, token_dtype
from calm.errors import UserError
from calm.integrity import find_damage

START, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def quiet_datasets():
    datasets.disable_progress_bars()


def same_blocks(left, right):
    assert len(left) == len(right)
    for a, b in zip((left[i] for i in range(len(left))), right, strict=True):
        assert all(np.array_equal(a[key], b[key]) for key in ("input_ids", "labels"))


@pytest.mark.parametrize(
    ("start", "patch_size", "block_size"),
    [(None, 4, 16), (None, 1, 7), (START, 4, 16), (START, 3, 12), (START, 1, 64), (START, 4, 4096)],
)
def test_blocks_are_those_of_text_that_is_not_prepared(start, patch_size, block_size, tmp_path):
    texts = random_texts(60)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    prepared = prepare(tmp_path / "out", path, patch_size=patch_size, percentage=20)
    layout = None if start is None else Layout(start, EOS, patch_size)
    for split, is_chosen in (("train", False), ("validation", True)):
        chosen = [text for text in texts if is_held_out(text, 20) is is_chosen]
        expected = pack_documents(
            datasets.Dataset.from_dict({"text": chosen}), TOKENIZER,
            block_size=block_size, patch_size=patch_size, start_token_id=start,
        )  # fmt: skip
        found = blocks_of(prepared, split, block_size=block_size, layout=layout)
        same_blocks(found, [expected[i] for i in range(len(expected))])
        assert found.num_tokens == expected.num_tokens
        assert found.tokens_per_character == pytest.approx(expected.tokens_per_character)
    assert len(prepared.description.of_split("train")) > 3


def test_long_and_short_documents_cross_shards_and_blocks(tmp_path):
    texts = ["a", "b" * 1000, "c", "d" * 37, "e"]
    prepared = prepare(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", texts), size=20)
    for start in (None, START):
        layout = None if start is None else Layout(start, EOS, 4)
        table = datasets.Dataset.from_dict({"text": texts})
        options = {"block_size": 32, "patch_size": 4, "start_token_id": start}
        expected = pack_documents(table, TOKENIZER, **options)
        found = blocks_of(prepared, block_size=32, layout=layout)
        same_blocks(found, [expected[i] for i in range(len(expected))])
    first = blocks_of(prepared, block_size=32, max_blocks=3)
    assert len(first) == 3 and first.data_hash() != blocks_of(prepared, block_size=32).data_hash()


def test_every_form_of_a_text_gives_the_same_tokens(tmp_path):
    texts = [text + " ä" for text in random_texts(40)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "set").mkdir()
    for name in ("a.jsonl", "set/train.jsonl"):
        (tmp_path / name).write_text(lines, encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    with pyarrow.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as packed:
        packed.write(lines.encode())
    for index in range(4):  # grouped and cut
        write_jsonl(tmp_path / f"part{index}.jsonl", texts[index * 10 : index * 10 + 10])
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    names = ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "part*.jsonl", "set")
    found = {}
    for number, name in enumerate(names):
        prepared = prepare(tmp_path / f"out{number}", str(tmp_path / name), size=400)
        blocks = blocks_of(prepared)
        found[name] = np.concatenate([blocks[i]["input_ids"] for i in range(len(blocks))]).tolist()
        assert len(prepared.description.shards) > 2, name
        assert prepared.description.sources[0].documents == 40
    assert all(tokens == found["a.jsonl"] for tokens in found.values())


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_spans_of_a_file_are_its_lines_once_with_their_numbers(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    lines = [json.dumps({"text": f"text {n}"}).encode() for n in range(9)]
    lines[3], lines[7] = b"\xff broken", b""
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    whole = [str(entry) for entry in read_documents([str(path)])]
    assert any(entry.startswith(f"{path}:4: not UTF-8") for entry in whole)
    size = path.stat().st_size
    for step in (1, 2, 5, 23, 24, 100, size):
        spans = [
            str(entry)
            for start in range(0, size, step)
            for entry in read_lines(str(path), start, min(start + step, size))
        ]
        assert spans == whole, step


def test_processes_write_the_same_files(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", random_texts(80))
    contents = []
    for workers in (1, 2):
        folder = tmp_path / f"out{workers}"
        prepare(folder, path, workers=workers, percentage=10)
        contents.append({file.name: file.read_bytes() for file in sorted(folder.iterdir())})
    assert contents[0] == contents[1]


class KillError(Exception):
    pass


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz"])
def test_a_run_that_stopped_keeps_what_is_finished(form, tmp_path, monkeypatch):
    """At every shard: before it is renamed, and after it but before it is listed."""
    path = tmp_path / f"a.{form}"
    write_jsonl(tmp_path / "plain.jsonl", random_texts(40))
    lines = (tmp_path / "plain.jsonl").read_bytes()
    path.write_bytes(gzip.compress(lines) if form.endswith("gz") else lines)
    whole = tmp_path / "whole"
    prepare(whole, str(path), percentage=20)
    expected = {file.name: file.read_bytes() for file in whole.iterdir()}
    finish, count = ShardWriter.finish, len(read_description(whole).shards)
    for number in range(count):
        folder, made = tmp_path / f"out{number}", []

        def stop(self, made=made, number=number):
            made.append(self)
            if len(made) - 1 == number // 2 * 2:
                if number % 2:
                    finish(self)
                raise KillError
            return finish(self)

        monkeypatch.setattr(ShardWriter, "finish", stop)
        with pytest.raises(KillError):
            prepare(folder, str(path), percentage=20)
        assert is_prepared(folder)
        with pytest.raises(UserError, match="its preparation has not finished; run the same"):
            PreparedText(folder)
        states = [json.loads(file.read_text()) for file in (folder / UNFINISHED).glob("data*")]
        kept = {shard["name"] for state in states for shard in state["shards"]}
        inodes = {name: (folder / f"{name}{TOKENS}").stat().st_ino for name in kept}
        monkeypatch.setattr(ShardWriter, "finish", finish)
        prepare(folder, str(path), percentage=20)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == expected
        assert all((folder / f"{name}{TOKENS}").stat().st_ino == i for name, i in inodes.items())
        shutil.rmtree(folder)


def test_damage_is_refused_with_its_line_or_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}) for text in random_texts(40)]
    lines[11], lines[30] = "oops", '{"body": 1}'
    path.write_text("\n".join(lines))
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"a\.jsonl:12: not JSON.*on_error=skip"):
            prepare(tmp_path / "out", str(path), workers=workers, size=10**6)
        assert not (tmp_path / "out" / UNFINISHED).exists()  # nothing was finished
    with pytest.raises(UserError, match=r"a\.jsonl:12: not JSON"):
        prepare(tmp_path / "out", str(path))
    kept = set((tmp_path / "out").glob("train-*"))
    prepared = prepare(tmp_path / "out", str(path), on_error="skip")
    assert kept and kept < set((tmp_path / "out").glob("train-*"))
    (source,) = prepared.description.sources
    assert (source.documents, source.skipped) == (38, 2)
    assert str(source.first_skipped).startswith(f"{path}:12: not JSON")
    whole = [entry for entry in read_documents([str(path)]) if isinstance(entry, Damage)]
    assert [entry.line for entry in whole] == [12, 31]


def test_the_record_names_what_was_read(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", random_texts(30))
    prepared = prepare(tmp_path / "out", path, percentage=20)
    made, (source,) = prepared.description, prepared.description.sources
    assert source.files == [["a.jsonl", (tmp_path / "a.jsonl").stat().st_size]]
    assert source.tokens == sum(shard.tokens for shard in made.shards)
    assert source.documents == 30 == sum(shard.documents for shard in made.shards)
    assert made.dtype == "<u2" and made.patch_size == 4
    assert find_damage(tmp_path / "out", ((DESCRIPTION,),)) is None
    other = prepare(tmp_path / "other", path, size=1000)
    assert other.description.sources[0].characters == source.characters


@pytest.mark.parametrize(("entries", "expected"), [(2, "u1"), (256, "u1"), (257, "<u2"),
                                                   (65536, "<u2"), (65537, "<u4")])  # fmt: skip
def test_ids_take_the_smallest_type(entries, expected):
    assert token_dtype(entries) == np.dtype(expected)
    assert np.array([entries - 1]).astype(token_dtype(entries))[0] == entries - 1


class TestRefused:
    """One clear error for what does not fit together."""

    @pytest.fixture
    def folder(self, tmp_path):
        prepare(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", random_texts(30)))
        return tmp_path / "out"

    @pytest.mark.parametrize("ending", [TOKENS, ENDS])
    def test_shards_that_are_not_those_of_the_manifest(self, ending, folder):
        shard = next(folder.glob(f"*{ending}"))
        content = shard.read_bytes()
        shard.write_bytes(content[:-1])
        with pytest.raises(UserError, match=rf"{shard.name} holds .* bytes, and prepared\.json"):
            PreparedText(folder)
        shard.unlink()
        with pytest.raises(UserError, match=f"{shard.name} is missing"):
            PreparedText(folder)

    def test_a_record_that_was_changed(self, folder):
        path = folder / DESCRIPTION
        path.write_text(path.read_text().replace('"<u2"', '"<u4"'))
        with pytest.raises(UserError, match=r"prepared\.json are not those that"):
            PreparedText(folder)

    def test_a_token_outside_the_vocabulary(self, folder):
        shard = min(folder.glob(f"*{TOKENS}"))
        shard.write_bytes(b"\xff" * shard.stat().st_size)
        with pytest.raises(UserError, match="holds a token 65535, and the vocabulary has 259"):
            blocks_of(PreparedText(folder))[0]
        assert "are not those that were written" in find_damage(folder, ((DESCRIPTION,),))

    def test_another_tokenizer_or_k(self, folder):
        prepared = PreparedText(folder)
        own = prepared.description.tokenizer_hash
        with pytest.raises(UserError, match="prepared with another tokenizer"):
            prepared.check("0" * 16, None, 4)
        with pytest.raises(UserError, match=r"start chunks of K=4 tokens, and the model has K=2"):
            prepared.check(own, START, 2)
        prepared.check(own, None, 2)
        prepared.check(own, START, 4)

    @pytest.mark.parametrize("workers", [1, 2])
    def test_text_that_holds_nothing(self, workers, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 3)
        words = {"good": write_jsonl(tmp_path / "b.jsonl", ["b"]), "bad": str(tmp_path / "a.jsonl")}
        with pytest.raises(UserError, match=r"a\.jsonl: holds no document"):
            prepare(tmp_path / "out", words, workers=workers)
        with pytest.raises(UserError, match=r"source bad: .* holds no text; 1 entries could"):
            prepare(tmp_path / "out", words, on_error="skip", workers=workers)
        one = write_jsonl(tmp_path / "one.jsonl", ["one"])
        with pytest.raises(UserError, match=r"1 documents leave no .* if 5 % are held out"):
            prepare(tmp_path / "one", one, percentage=5)

    def test_another_preparation_in_the_folder(self, folder, tmp_path):
        request = {"sources": {}, "tokenizer": "other"}
        with pytest.raises(UserError, match="holds another prepared text; pass --overwrite"):
            preparing.find_preparation(folder, request)
        (folder / "keep.txt").write_text("mine")
        preparing.clear_folder(folder)
        assert preparing.find_preparation(folder, request) == "none"
        assert not list(folder.glob("train-*")) and (folder / "keep.txt").exists()
        (folder / "manifest.json").write_text("{}")
        with pytest.raises(UserError, match="holds a model"):
            preparing.find_preparation(folder, request)
