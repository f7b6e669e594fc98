"""One rule turns documents and prompts into ids; long texts are cut where that changes nothing."""

import random

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from tokenizers_like import BEGIN, CHAT, END, TEXT, gpt2_like, llama2_like, llama3_like
from transformers import PreTrainedTokenizerFast

from calm.data import encoding
from calm.data.encoding import WORDS, Encoder, document_separator, vocabulary_size
from calm.data.tokenizer import byte_tokenizer, train_bpe_tokenizer
from calm.errors import UserError

KINDS = {
    "bytes": byte_tokenizer,
    "gpt2": gpt2_like,
    "gpt2 begins and ends": lambda: gpt2_like(f"{BEGIN} $A {END}"),
    "llama2": llama2_like,
    "llama3": llama3_like,
    "llama3 ends": lambda: llama3_like(f"$A {END}"),
}
TEXTS = [TEXT, "", " ", "x", f"a {CHAT} b", "漢字 עברית 🏳️‍🌈", f"{END} x"]


@pytest.fixture(params=KINDS, scope="module")
def tokenizer(request):
    return KINDS[request.param]()


def documents(tokenizer, texts):
    return [ids.tolist() for ids in Encoder(tokenizer).documents(texts)]


class TestRule:
    def test_documents_are_what_the_tokenizer_says_and_end(self, tokenizer):
        eos = tokenizer.eos_token_id
        for text, ids in zip(TEXTS, documents(tokenizer, TEXTS), strict=True):
            plain = tokenizer(text)["input_ids"]
            expected = plain if plain[-1:] == [eos] else [*plain, eos]
            assert ids == (expected if text else [])

    def test_prompts_begin_as_documents_do(self, tokenizer):
        for text in filter(None, TEXTS):
            (document,) = documents(tokenizer, [text])
            prompt = Encoder(tokenizer).prompt(text)
            assert document == [*prompt, tokenizer.eos_token_id]

    def test_special_tokens_are_parsed_in_both(self, tokenizer):
        if tokenizer.convert_tokens_to_ids(CHAT) is None:
            pytest.skip("has no token for chats")
        marker = tokenizer.convert_tokens_to_ids(CHAT)
        (document,) = documents(tokenizer, [f"{CHAT}hello{CHAT}"])
        assert document.count(marker) == 2 == Encoder(tokenizer).prompt(CHAT * 2).count(marker)

    def test_a_begin_token_that_is_spelled_out_is_not_doubled(self, tokenizer):
        begin = tokenizer.bos_token
        for ids in (
            Encoder(tokenizer).prompt(f"{begin}hello"),
            *documents(tokenizer, [f"{begin}hello"]),
        ):
            assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id

    def test_an_end_token_that_is_spelled_out_is_not_doubled(self, tokenizer):
        (ids,) = documents(tokenizer, [f"hello{tokenizer.eos_token}"])
        assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id

    def test_a_byte_order_mark_is_dropped(self, tokenizer):
        assert documents(tokenizer, ["\ufeffhello"]) == documents(tokenizer, ["hello"])
        assert Encoder(tokenizer).prompt("\ufeffhello") == Encoder(tokenizer).prompt("hello")


def test_the_separator_is_the_end_token_that_a_tokenizer_does_not_add():
    found = {name: document_separator(make()) for name, make in KINDS.items()}
    assert found == {
        "bytes": 257, "gpt2": 1, "gpt2 begins and ends": None, "llama2": 1, "llama3": 1,
        "llama3 ends": None,
    }  # fmt: skip


def calls(tokenizer, text):
    """The pieces of a text that the tokenizer is called with."""
    encoder, seen = Encoder(tokenizer), []
    encode = encoder._call
    encoder._call = lambda texts: seen.extend(texts) or encode(texts)
    encoder.prompt(text)
    return seen


class TestLongTexts:
    """Pieces are as short as they get here, so that every place for a cut is used."""

    @pytest.fixture(autouse=True)
    def short_pieces(self, monkeypatch):
        monkeypatch.setattr(encoding, "PIECE_LENGTH", 1)
        monkeypatch.setattr(encoding, "CALL_LENGTH", 8)

    def texts(self):
        generator = random.Random(0)
        parts = ["a", "Z", "é", "漢", "'s", "'", "1", "²", "_", ".", "!", " ", "  ", "\n", "\r\n",
                 "\t", "\u00a0", "\u3000", "\u0301", "the", " cat", "🏳️", CHAT, END]  # fmt: skip
        return ["".join(generator.choices(parts, k=60)) for _ in range(200)]

    def test_are_the_same_ids_in_pieces(self, tokenizer):
        texts = self.texts()
        plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        assert [ids.tolist() for ids in Encoder(tokenizer)._encode(texts)] == plain

    def test_are_cut_where_that_is_safe(self):
        bpe = train_bpe_tokenizer([TEXT] * 9, 300)
        for safe in (
            byte_tokenizer(),
            bpe,
            gpt2_like(),
            llama3_like(),
            llama3_like(words=WORDS[1]),
        ):
            assert calls(safe, "ab cd\nef, gh.\ni_ j") == ["ab", " cd", "\nef, gh.\ni_", " j"]
        spaced = gpt2_like()
        spaced.add_special_tokens({"additional_special_tokens": ["<a b>"]})
        for unsafe in (llama2_like(), llama3_like(words=r"\s+|\S+"), spaced):
            assert calls(unsafe, "ab cd\nef") == ["ab cd\nef"]


def test_calls_of_the_tokenizer_are_bounded(monkeypatch):
    tokenizer = byte_tokenizer()
    sizes, encode = [], Encoder._call

    def call(self, texts):
        sizes.append(sum(map(len, texts)))
        return encode(self, texts)

    monkeypatch.setattr(Encoder, "_call", call)
    line = "word " * 300_000
    long, *short = Encoder(tokenizer).documents([line, *["x" * 1000] * 700])
    assert bytes(long[:-1].astype(np.uint8)).decode() == line and len(short) == 700
    assert max(sizes) <= encoding.CALL_LENGTH and len(sizes) < 12


def test_a_vocabulary_with_holes_ends_after_its_largest_id():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 7}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert (len(tokenizer), vocabulary_size(tokenizer)) == (2, 8)


def test_a_tokenizer_that_changes_the_text_itself_is_refused():
    class Odd:
        def __call__(self, text, add_special_tokens):
            return {"input_ids": [3, 4] if add_special_tokens else [5]}

    with pytest.raises(UserError, match=r"turns 'a' into \[3, 4\], and without .* into \[5\]"):
        Encoder(Odd())
