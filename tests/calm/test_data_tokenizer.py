"""Tokenizers: bytes and trained BPE give every text back; what a usable tokenizer must have."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from calm.data import tokenizer as tokenizer_module
from calm.data.tokenizer import (
    BYTE_VOCAB_SIZE,
    byte_tokenizer,
    load_tokenizer,
    tokenizer_hash,
    train_bpe_tokenizer,
)
from calm.errors import UserError
from calm.integrity import write_manifest

TEXTS = [
    "plain words, and more words",
    "  spaces  \t tabs \r\n\n and breaks ",
    "Zoë naïve ﬁ e\u0301 漢字 עברית 🏳️‍🌈 \u200b\ufeff",
    "".join(map(chr, range(256))),
    "\U0010ffff\x00",
]


def encode(tokenizer, text):
    return tokenizer(text)["input_ids"]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe_tokenizer(["the cat sat on the mat with the hat"] * 20, 300)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
class TestRoundTrip:
    def test_bytes_are_the_ids(self, text):
        tokenizer = byte_tokenizer()
        assert encode(tokenizer, text) == list(text.encode())
        assert tokenizer.decode(encode(tokenizer, text)) == text

    def test_bpe_gives_the_text_back(self, bpe, text):
        assert bpe.decode(encode(bpe, text)) == text

    def test_saved_tokenizers_are_the_same(self, bpe, tmp_path, text):
        for number, tokenizer in enumerate((byte_tokenizer(), bpe)):
            tokenizer.save_pretrained(tmp_path / str(number))
            loaded = AutoTokenizer.from_pretrained(tmp_path / str(number))
            assert encode(loaded, text) == encode(tokenizer, text)
            assert loaded.decode(encode(loaded, text)) == text
            assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)


def test_a_long_text_is_learned_from_in_pieces(monkeypatch):
    text = "the cat sat on the mat, with 3 hats.\nIt's there\n\n " * 20
    whole = train_bpe_tokenizer([text], 300)
    monkeypatch.setattr(tokenizer_module, "TRAINING_LENGTH", 1)
    assert tokenizer_hash(train_bpe_tokenizer([text], 300)) == tokenizer_hash(whole)


def test_a_trained_vocabulary_has_no_pieces_of_special_tokens():
    text = "one <|end_of_text|> two"
    tokenizer = train_bpe_tokenizer([text] * 50, 320)
    assert not any("end" in token for token in tokenizer.get_vocab() if token != "<|end_of_text|>")
    assert tokenizer.decode(encode(tokenizer, text)) == text
    assert encode(tokenizer, text).count(tokenizer.eos_token_id) == 1


def test_byte_vocabulary():
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == BYTE_VOCAB_SIZE == 259
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        256,
        257,
        258,
    )


def test_bpe_learns_merges_and_is_deterministic(bpe):
    again = train_bpe_tokenizer(["the cat sat on the mat with the hat"] * 20, 300)
    assert tokenizer_hash(again) == tokenizer_hash(bpe) != tokenizer_hash(byte_tokenizer())
    assert len(encode(bpe, "the cat")) < len("the cat") and BYTE_VOCAB_SIZE < len(bpe) <= 300
    assert (bpe.bos_token_id, bpe.eos_token_id, bpe.pad_token_id) == (0, 1, 2)


def test_names():
    assert len(load_tokenizer("bytes")) == 259
    assert len(load_tokenizer("bpe:270", texts=["aaaa bbbb"] * 4)) <= 270


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("bpe:300", "trained on documents"),
        ("bpe", "tokenizer_name: expected 'bpe:' and a number of entries, got 'bpe'"),
        ("bpe:4k", "got 'bpe:4k'"),
        ("bpe:100", "at least 259 entries, got 100"),
        ("no/such/folder", r"a tokenizer from 'no/such/folder' .* 'bytes' or 'bpe:4096'"),
    ],
)
def test_unusable_names(name, complaint):
    with pytest.raises(UserError, match=complaint):
        load_tokenizer(name, texts=["x"] if name == "bpe:100" else None)


class TestSpecialTokens:
    def save(self, folder, **special):
        words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
        return str(folder)

    def test_no_end_token(self, tmp_path):
        with pytest.raises(UserError, match=r"has no end token.*add_special_tokens"):
            load_tokenizer(self.save(tmp_path))

    def test_no_pad_token(self, tmp_path):
        with pytest.raises(UserError, match=r"has no pad token, and add_pad_token is off; set one"):
            load_tokenizer(self.save(tmp_path, eos_token="</s>"), add_pad_token=False)

    def test_published_pad_token(self, tmp_path, caplog):
        folder = self.save(tmp_path, eos_token="</s>")
        with caplog.at_level("INFO", logger="calm"):
            tokenizer = load_tokenizer(folder)
        assert tokenizer.pad_token == "[PAD]" and tokenizer.pad_token_id == 3 == len(tokenizer) - 1
        (record,) = caplog.records
        assert "appended [PAD], the vocabulary has 4 entries now" in record.getMessage()
        assert "to avoid this set one and save the tokenizer" in record.getMessage()

    def test_a_pad_token_that_would_take_the_id_of_another_token(self, tmp_path):
        words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 2, "a": 3}, unk_token="<unk>"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(UserError, match=r"ids have holes, so that \[PAD\] got the id 3"):
            load_tokenizer(str(tmp_path))

    def test_a_pad_token_of_its_own_stays(self, tmp_path, caplog):
        folder = self.save(tmp_path, eos_token="</s>", pad_token="a")
        with caplog.at_level("INFO", logger="calm"):
            assert load_tokenizer(folder).pad_token_id == 2
        assert not caplog.records


def test_a_letter_of_the_vocabulary_is_another(tmp_path):
    """The file is as readable as before, and would give other ids."""
    byte_tokenizer().save_pretrained(tmp_path)
    write_manifest(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"a": 97', '"b": 97').replace('"b": 98', '"a": 98'))
    with pytest.raises(UserError, match=r"tokenizer_name: .* the bytes of tokenizer\.json are not"):
        load_tokenizer(str(tmp_path))
