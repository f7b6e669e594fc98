"""A folder of `calm prepare` as held-out text: the scores of its documents, or one line."""

import json
from types import SimpleNamespace

import pytest
from cli_cases import EOS, PAD, calm, error_of
from tiny_models import tiny_calm
from training_cases import MAIN, flags, write_corpus

from calm.commands.gap_flags import _training_blocks
from calm.data.corpus import is_held_out
from calm.data.tokenizer import BYTE_VOCAB_SIZE, byte_tokenizer
from calm.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
SHARE = 20
SIZES = ("--num-samples", 2, "--block-size", 32)


@pytest.fixture
def text(tmp_path):
    """A text: its file."""
    return write_corpus(tmp_path)


@pytest.fixture
def prepare(text, tmp_path, capsys):
    """Prepares `text`: the folder."""

    def make(name, *extra, tokenizer="bytes", share=SHARE):
        words = ("--tokenizer", tokenizer, "--validation-split-percentage", share)
        assert calm("prepare", "--data", text, *words, "--output", tmp_path / name, *extra) == 0
        capsys.readouterr()
        return tmp_path / name

    return make


@pytest.fixture
def started(folders):
    """A CALM that reads a chunk before each document."""
    special = {"eos_token_id": EOS, "pad_token_id": PAD, "vocab_size": BYTE_VOCAB_SIZE}
    folder = folders / "started"
    if not folder.is_dir():
        tiny_calm(**special, has_start_patch=True, bos_token_id=256).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    return folder


def without_text(record):
    """A record but for what names the text."""
    return {**record, "protocol": {**record["protocol"], "data": None}}


@pytest.mark.parametrize("kind", ["baseline", "started"])
def test_eval_scores_what_was_held_out(kind, text, prepare, started, folders, tmp_path):
    found = []
    words = ("--model", folders / kind, *SIZES)
    of_text = ("--data", text, "--validation-split-percentage", SHARE)
    for source in (of_text, ("--data", prepare("out"))):
        assert calm("eval", *words, *source, "--json", tmp_path / "found.json") == 0
        found.append(json.loads((tmp_path / "found.json").read_text()))
    assert found[1]["protocol"]["data"] == str(tmp_path / "out")
    assert found[1]["protocol"]["held_out_percentage"] == SHARE
    assert without_text(found[0]) == without_text(found[1])


def test_compare_takes_it(text, prepare, folders, tmp_path):
    words = (folders / "calm", folders / "baseline", *SIZES, "--json", tmp_path / "found.json")
    found = []
    of_text = ("--data", text, "--validation-split-percentage", SHARE)
    for source in (of_text, ("--data", prepare("out"))):
        assert calm("compare", *words, *source) == 0
        found.append(json.loads((tmp_path / "found.json").read_text()))
    assert found[0]["rows"] == found[1]["rows"]


def test_what_cannot_be_scored(prepare, started, folders, capsys):
    def refused(folder, *extra, model="calm", command="eval"):
        words = ("--model", folders / model, "--data", folder, *SIZES, *extra)
        assert calm(command, *words) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    whole = prepare("whole", share=0)
    message = refused(whole)
    assert f"{whole} holds no held-out document: prepare the text with a --validation" in message
    other = prepare("other", tokenizer="bpe:300")
    assert f"{other} was prepared with another tokenizer" in refused(other)
    three = prepare("three", "--patch-size", 3)
    assert "start chunks of K=3 tokens, and the model has K=4" in refused(three, model="started")
    message = refused(three, "--validation-split-percentage", 5)
    assert "--validation-split-percentage: " in message and "with 20 % held out, got 5" in message
    (three / ".unfinished").mkdir()
    assert "its preparation has not finished" in refused(three)
    words = (folders / "calm", folders / "baseline", "--data", other, *SIZES)
    assert "was prepared with another tokenizer" in error_of(capsys, "compare", *words)


def test_readouts_learn_from_what_is_not_held_out(prepare, folders):
    """Of `calm experiment gap`."""
    model, folder = tiny_calm(), str(prepare("out"))
    args = SimpleNamespace(
        model=str(folders / "calm"), data=folder, train_data=None, block_size=32, text_unit="line",
        on_error="stop", validation_split_percentage=None,
    )  # fmt: skip
    blocks, name = _training_blocks(args, model, byte_tokenizer())
    documents = json.loads((prepare("out") / "prepared.json").read_text())["shards"]
    tokens = sum(shard["tokens"] for shard in documents if shard["split"] == "train")
    assert name == folder and blocks.num_tokens == tokens
    args.data, args.train_data, args.validation_split_percentage = "other.txt", folder, SHARE + 1
    with pytest.raises(UserError, match=r"prepare it with .*-percentage 21"):
        _training_blocks(args, model, byte_tokenizer())


def test_training_evaluates_on_it(text, prepare, tmp_path):
    """As on the documents that it holds out, whatever is trained on, or nothing."""
    with open(text) as file:
        kept = [line for line in file if not is_held_out(json.loads(line)["text"], SHARE)]
    (tmp_path / "kept.jsonl").write_text("".join(kept))
    held_out = f"--validation_file={prepare('out')}"
    trained = tmp_path / "prepared" / "baseline"
    found = {}
    for name, source, extra in (
        ("plain", text, ("--do_train",)),
        ("prepared", tmp_path / "kept.jsonl", ("--do_train", held_out)),
        ("alone", None, (held_out, f"--model_name_or_path={trained}", "--config_overrides=")),
    ):
        (tmp_path / name).mkdir()
        words = flags(tmp_path / name, "baseline", "--do_eval", *extra, text=source or "none")
        assert MAIN["baseline"]([word for word in words if word != "--train_file=none"]) == 0
        results = tmp_path / name / "baseline" / "eval_results.json"
        found[name] = json.loads(results.read_text())["eval_loss"]
    assert found["plain"] == found["prepared"] == found["alone"]
    assert json.loads((trained / "protocol.json").read_text())["validation_files"] == ["out"]
