"""Documents from files, folders and the interpreter; the split; every complaint about bad input."""

import gc
import gzip
import json
import re

import datasets
import numpy as np
import pyarrow
import pytest
from torch.utils.data import DataLoader

from calm.data.blocks import collate
from calm.data.corpus import is_held_out, load_corpus
from calm.data.files import expand_files
from calm.data.options import CorpusOptions
from calm.data.packing import pack_documents
from calm.data.reading import Damage, read_documents
from calm.data.tokenizer import byte_tokenizer
from calm.errors import UserError, UserNotice, message_of


@pytest.fixture(autouse=True)
def quiet_datasets():
    datasets.disable_progress_bars()


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def zstd(content):
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


def jsonl(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def texts(*files, **options):
    return list(read_documents(files, **options))


def random_bytes(count):
    """Lines of letters in no order, which gzip hardly shortens."""
    letters = np.random.default_rng(0).integers(97, 123, count).astype(np.uint8)
    letters[::40] = 10
    return letters.tobytes()


def load(tmp_path, **options):
    return load_corpus(CorpusOptions(cache_dir=str(tmp_path / "cache"), **options))


class TestFiles:
    POEM = "one\ntwo\n\nthree\n"

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, ["one\n", "two\n", "\n", "three\n"]),
            ({"keep_linebreaks": False}, ["one", "two", "three"]),
            ({"text_unit": "paragraph"}, ["one\ntwo\n", "three\n"]),
            ({"text_unit": "paragraph", "keep_linebreaks": False}, ["one two", "three"]),
            ({"text_unit": "file"}, [POEM]),
        ],
    )
    def test_text_is_cut_as_asked(self, write, options, expected):
        assert texts(write("poem.txt", self.POEM), **options) == expected

    def test_json_lines_json_arrays_and_gzip_hold_the_same_documents(self, write):
        documents = ["ein Döner 🥙", 'quote " and \\ slash', "two\nlines"]
        lines = jsonl(*documents)
        array = json.dumps([{"text": text} for text in documents], indent=1)
        for file in (
            write("a.jsonl", lines),
            write("a.json", lines),
            write("b.json", array),
            write("a.jsonl.gz", gzip.compress(lines.encode())),
            write("a.jsonl.ZST", zstd(lines.encode())),
            write("b.jsonl.zst", zstd(lines.encode()[:10]) + zstd(lines.encode()[10:])),
        ):
            assert texts(file) == documents

    def test_other_text_files_parquet_and_upper_case(self, write, tmp_path):
        for name in ("code.py", "README.md", "notes", "A.TXT"):
            assert texts(*expand_files(write(name, "one\ntwo\n"))) == ["one\n", "two\n"]
        assert texts(*expand_files(write("B.JSONL", jsonl("x")))) == ["x"]
        path = str(tmp_path / "c.parquet")
        datasets.Dataset.from_dict({"text": ["p", None], "other": [1, 2]}).to_parquet(path)
        first, damage = texts(*expand_files(path))
        assert first == "p" and str(damage).endswith('row 1: "text" must be a string, got null')

    def test_byte_order_marks_are_dropped(self, write):
        mark = "\ufeff"
        first, second = write("a.txt", f"{mark}one\n"), write("b.txt", f"{mark}two\n{mark}three\n")
        assert texts(first, second) == ["one\n", "two\n", "three\n"]
        assert texts(write("c.jsonl", mark + jsonl(f"{mark}four"))) == ["four"]
        assert texts(write("d.json", f'{mark}[{{"text": "five"}}]')) == ["five"]

    def test_a_damaged_line_spoils_its_document_alone(self, write):
        file = write("a.txt", b"one\ntw\xff\n\nthree\n")
        found = {unit: texts(file, text_unit=unit) for unit in ("line", "paragraph", "file")}
        kinds = {unit: [type(entry) for entry in entries] for unit, entries in found.items()}
        assert kinds == {
            "line": [str, Damage, str, str],
            "paragraph": [Damage, str],
            "file": [Damage],
        }
        assert found["paragraph"][1] == "three\n"

    def test_a_comma_in_a_path(self, write, tmp_path):
        first, second = write("a,b.txt", "x"), write("c.txt", "y")
        assert expand_files(f"{first}, {second}") == [first, second]
        assert expand_files(f"{second},{first}") == [second, first]

    def test_empty_files_and_folders_of_a_glob_are_skipped(self, write, tmp_path):
        write("set/empty.txt", "")
        write("set/folder/x.txt", "x")
        kept = write("set/full.txt", "x")
        with pytest.warns(UserNotice, match=r"skipped 1 empty files, the first is .*empty\.txt"):
            assert expand_files(f"{tmp_path}/set/*") == [kept]

    def test_files_keep_the_order_of_list_and_glob(self, write, tmp_path):
        for name in ("b", "a", "c"):
            write(f"{name}.jsonl", jsonl(name))
        last = str(tmp_path / "b.jsonl")
        assert expand_files(f"{tmp_path}/[ac].jsonl, {last}") == [
            str(tmp_path / "a.jsonl"), str(tmp_path / "c.jsonl"), last,
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("name", "content", "complaint"),
        [
            ("bad.jsonl", jsonl("x") + '{"text": "y"\n', r"bad\.jsonl:2: not JSON"),
            ("bad.jsonl", "plain words\n", r"bad\.jsonl:1: not JSON .*\{\"text\": \"\.\.\.\"\}"),
            ("bad.jsonl", '{"content": "x"}\n', r'bad\.jsonl:1: no "text" key \(keys: content\)'),
            ("bad.jsonl", '{"text": 3}\n', r'bad\.jsonl:1: "text" must be a string, got int'),
            ("bad.jsonl", "[1]\n", r"bad\.jsonl:1: expected an object .* got list"),
            ("bad.jsonl", '{"text": "\\ud800"}\n', r"bad\.jsonl:1: half of a surrogate pair"),
            ("bad.jsonl", "\n\n", r"bad\.jsonl: holds no document"),
            ("bad.json", '[{"text": "x"},\n{"text" "y"}]', r"bad\.json: not JSON .* of line 2"),
            ("bad.jsonl", "[" * 100_000, r"bad\.jsonl:1: JSON that is nested too deeply"),
            ("bad.jsonl", '{"text": ' + "1" * 5000 + "}\n", r"bad\.jsonl:1: JSON .*4300"),
            ("bad.jsonl", '{"text": null}\n', r'bad\.jsonl:1: "text" must be a string, got null'),
            ("bad.parquet", b"PAR1 nothing", r"bad\.parquet: row 0: damaged Parquet"),
            ("bad.json", '[{"text": "x"}, {}]', r'bad\.json: entry 1: no "text" key'),
            ("bad.txt", b"fine\nna\xefve\n", r"bad\.txt:2: not UTF-8 .* byte 2"),
            (
                "bad.txt.gz",
                gzip.compress(b"words\n" * 99, mtime=0)[:-12],
                r"bad\.txt\.gz:\d+: damaged gzip",
            ),
            ("bad.txt.zst", zstd(b"words\n" * 99)[:-9], r"bad\.txt\.zst:\d+: cannot be read"),
            ("bad.txt.zst", b"no zstd at all", r"bad\.txt\.zst:1: cannot be read \(ZSTD"),
            ("bad.txt.gz", b"no gzip at all", r"bad\.txt\.gz:1: damaged gzip"),
            (
                "bad.txt.gz",
                gzip.compress(random_bytes(9999), mtime=0)[:5000] + bytes(5000),
                r"bad\.txt\.gz:\d+: damaged gzip",
            ),
        ],
        ids=lambda value: None if isinstance(value, bytes) else str(value)[:24],
    )
    def test_damage_is_named_with_file_and_line(self, write, name, content, complaint):
        damage = [entry for entry in texts(write(name, content)) if isinstance(entry, Damage)]
        assert re.search(complaint, str(damage[0])), damage

    @pytest.mark.parametrize(
        ("name", "complaint"),
        [
            ("missing.txt", "no file matches"),
            ("*.jsonl", "no file matches"),
            ("empty.txt", r"empty\.txt is empty"),
            ("table.xlsx", "is no text .text, .jsonl, .json and .parquet are read."),
            ("text.zip", "is compressed; unpack it"),
            ("unknown", "is no text: it holds zero bytes"),
            ("only-empty/*", "finds folders and empty files alone"),
            ("folder", r"is not a file; .* glob such as .*folder/\*"),
            (" , ", "names no file"),
        ],
    )
    def test_unusable_paths_are_refused_at_once(
        self, write, tmp_path, monkeypatch, name, complaint
    ):
        monkeypatch.chdir(tmp_path)
        write("empty.txt", "")
        write("only-empty/a.txt", "")
        write("table.xlsx", "a,b")
        write("text.zip", "a,b")
        write("unknown", b"a\0b")
        write("folder/a.txt", "x")
        with pytest.raises(UserError, match=f"validation_file: .*{complaint}"):
            expand_files(name, "validation_file")


class TestSplit:
    DOCUMENTS = tuple(f"document number {index}" for index in range(400))

    def test_is_a_partition_that_depends_on_the_text_alone(self, write, tmp_path):
        forwards = write("a.jsonl", jsonl(*self.DOCUMENTS))
        backwards = write("b.jsonl", jsonl(*reversed(self.DOCUMENTS)))
        corpora = [
            load(tmp_path, train_file=forwards, validation_split_percentage=10),
            load(tmp_path, train_file=backwards, validation_split_percentage=10),
            load(tmp_path, train_file=forwards, validation_split_percentage=10, streaming=True),
        ]
        held_out = {text for text in self.DOCUMENTS if is_held_out(text, 10)}
        assert 20 <= len(held_out) <= 60
        for corpus in corpora:
            assert {row["text"] for row in corpus.validation} == held_out
            assert {row["text"] for row in corpus.train} == set(self.DOCUMENTS) - held_out

    def test_a_larger_share_contains_the_smaller_one(self):
        small = {text for text in self.DOCUMENTS if is_held_out(text, 5)}
        assert small < {text for text in self.DOCUMENTS if is_held_out(text, 20)}

    def test_own_validation_files_leave_training_text_whole(self, write, tmp_path):
        train, validation = write("a.jsonl", jsonl(*self.DOCUMENTS)), write("v.jsonl", jsonl("v"))
        corpus = load(tmp_path, train_file=train, validation_file=validation)
        assert len(corpus.train) == 400 and corpus.validation["text"] == ["v"]

    def test_evaluation_needs_no_training_text(self, write, tmp_path):
        corpus = load(tmp_path, validation_file=write("v.jsonl", jsonl("v")))
        assert corpus.train is None and len(corpus.validation) == 1

    def test_an_empty_side_says_what_to_do(self, write, tmp_path):
        with pytest.raises(
            UserError, match=r"1 documents leave no validation document .*\(text_unit\)"
        ):
            load(tmp_path, train_file=write("a.jsonl", jsonl("only one")))

    @pytest.mark.parametrize("percentage", [-1, 100])
    def test_percentage_out_of_range(self, write, tmp_path, percentage):
        with pytest.raises(UserError, match=r"validation_split_percentage must lie in \[0, 100\)"):
            load(
                tmp_path,
                train_file=write("a.jsonl", jsonl("x")),
                validation_split_percentage=percentage,
            )


class TestSources:
    def test_a_changed_file_is_read_again(self, write, tmp_path):
        options = {"train_file": write("a.jsonl", jsonl("first")), "validation_split_percentage": 0}
        assert load(tmp_path, **options).train["text"] == ["first"]
        write("a.jsonl", jsonl("second", "third"))
        assert load(tmp_path, **options).train["text"] == ["second", "third"]

    @pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
    def test_processes_share_the_files_out(self, write, tmp_path):
        files = ",".join(write(f"{name}.jsonl", jsonl(name, name * 2)) for name in "abc")
        corpus = load(
            tmp_path, train_file=files, validation_split_percentage=0, preprocessing_num_workers=2
        )
        assert corpus.train["text"] == ["a", "aa", "b", "bb", "c", "cc"]

    @pytest.mark.parametrize("split", [["train", "test"], ["test"], ["validation"]])
    def test_splits_of_a_folder(self, write, tmp_path, split):
        for name in split:
            write(f"set/{name}.jsonl", jsonl(name))
        corpus = load(tmp_path, dataset_name=str(tmp_path / "set"), validation_split_percentage=0)
        if "train" in split:
            assert corpus.train["text"] == ["train"] and corpus.validation is None
        else:
            assert corpus.train is None and corpus.validation["text"] == split

    def test_a_file_is_no_dataset(self, write, tmp_path):
        with pytest.raises(UserError, match=r"a\.parquet is a file; pass it as train_file"):
            load(tmp_path, dataset_name=write("a.parquet", "x"))

    @pytest.mark.parametrize("streaming", [False, True])
    def test_folder_of_data_files(self, write, tmp_path, streaming):
        write("set/train.jsonl", '{"text": "t", "meta": 1}\n')
        write("set/validation.jsonl", '{"text": "v", "meta": 2}\n')
        corpus = load(tmp_path, dataset_name=str(tmp_path / "set"), streaming=streaming)
        assert list(corpus.train) == [{"text": "t"}] and list(corpus.validation) == [{"text": "v"}]

    def test_folder_of_save_to_disk(self, tmp_path):
        rows = datasets.Dataset.from_dict({"text": ["a", "b"], "other": [1, 2]})
        datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / "saved")
        corpus = load(tmp_path, dataset_name=str(tmp_path / "saved"))
        assert corpus.train["text"] == ["a", "b"] and corpus.train.column_names == ["text"]

    def test_folder_without_text_column(self, write, tmp_path):
        write("set/train.jsonl", '{"content": "t"}\n')
        with pytest.raises(UserError, match=r'train\.jsonl:1: no "text" key \(keys: content\)'):
            load(tmp_path, dataset_name=str(tmp_path / "set"))
        write("table/train.csv", "content\nt\n")  # datasets reads it
        with pytest.raises(UserError, match=r'no "text" column \(columns: content\)'):
            load(tmp_path, dataset_name=str(tmp_path / "table"))

    def test_nothing_named_and_two_things_named(self, write, tmp_path):
        with pytest.raises(UserError, match="no text to learn from; pass train_file"):
            load(tmp_path)
        with pytest.raises(UserError, match="exclude each other"):
            load(tmp_path, dataset_name="x", train_file=write("a.txt", "x"))

    def test_unknown_dataset_name(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        with pytest.raises(UserError, match="dataset_name: cannot load 'no/such-set'"):
            load(tmp_path, dataset_name="no/such-set")

    def test_a_folder_without_text(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match=r"no text that can be read in the folder .*empty"):
            load(tmp_path, dataset_name=str(tmp_path / "empty"))


class TestDamage:
    LINES = jsonl("a") + "oops\n" + jsonl("b") + '{"text": null}\n' + jsonl("c")

    @pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
    @pytest.mark.parametrize("workers", [1, 2])
    def test_stops_the_run_with_a_count(self, write, tmp_path, workers):
        files = ",".join(write(f"{name}.jsonl", self.LINES) for name in "ab")
        options = {"train_file": files, "preprocessing_num_workers": workers}
        with pytest.raises(UserError) as caught:
            load(tmp_path, **options)
        message = str(caught.value)
        assert "a.jsonl:2: not JSON (Expecting value at column 1)" in message
        assert message.endswith(
            "(and 3 more); mend the text, or skip what is damaged (on_error=skip)"
        )

    def test_is_skipped_and_counted(self, write, tmp_path, caplog):
        file = write("a.jsonl", self.LINES)
        options = {"train_file": file, "validation_split_percentage": 0, "on_error": "skip"}
        corpus = load(tmp_path, **options)
        assert corpus.train["text"] == ["a", "b", "c"] and corpus.skipped == 2
        assert "skipped 2 of 5 documents, the first: " in caplog.text and "a.jsonl:2" in caplog.text
        assert load(tmp_path, **options).skipped == 2  # from the cache

    @pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
    @pytest.mark.parametrize("workers", [0, 1])
    def test_of_a_stream(self, write, tmp_path, workers, caplog, monkeypatch):
        monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
        options = {
            "train_file": write("a.jsonl", self.LINES), "validation_split_percentage": 0,
            "streaming": True,
        }  # fmt: skip
        layout = {"tokenizer": byte_tokenizer(), "block_size": 8, "patch_size": 4}
        blocks = pack_documents(load(tmp_path, **options).train, **layout)
        with pytest.raises(UserError, match=r"a\.jsonl:2: not JSON") as caught:
            list(DataLoader(blocks, num_workers=workers, collate_fn=collate))
        message = message_of(caught.value)
        assert "\n" not in message and len(message) < 400
        del caught
        gc.collect()  # the workers of the failed loader
        corpus = load(tmp_path, **options, on_error="skip")
        assert [row["text"] for row in corpus.train] == ["a", "b", "c"] and corpus.skipped is None
        assert "skipped 2 documents so far, now: " in caplog.text

    def test_of_a_dataset(self, tmp_path):
        rows = datasets.Dataset.from_dict({"text": ["a", None, "b"]})
        rows.save_to_disk(tmp_path / "saved")
        options = {"dataset_name": str(tmp_path / "saved"), "validation_split_percentage": 0}
        with pytest.raises(UserError, match=r"saved \(train\), row 1: .* a string, got null"):
            load(tmp_path, **options)
        corpus = load(tmp_path, **options, on_error="skip")
        assert corpus.train["text"] == ["a", "b"] and corpus.skipped == 1

    def test_other_values(self, write, tmp_path):
        with pytest.raises(UserError, match="on_error must be stop or skip, got 'ignore'"):
            load(tmp_path, train_file=write("a.txt", "x"), on_error="ignore")
        with pytest.raises(UserError, match=r"all 1 documents are damaged, .*b\.jsonl:1"):
            load(tmp_path, train_file=write("b.jsonl", "oops"), on_error="skip")
