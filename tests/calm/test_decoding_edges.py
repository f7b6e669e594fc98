"""Text at an edge is decoded with what stands before it: spaces and characters survive."""

import io

import pytest
import torch
from tokenizers_like import TEXT, gpt2_like, llama2_like

from calm.data.encoding import Encoder
from calm.data.tokenizer import byte_tokenizer
from calm.decoding import TextStream
from calm.decoding.text.edges import TextPieces, text_after
from calm.decoding.text.stopping import StopStrings, TextBeforeStops

KINDS = {"bytes": byte_tokenizer, "gpt2": gpt2_like, "llama2": llama2_like}
WORDS = "the cat sat on\nthe mat, ©漢 and the cat"


@pytest.fixture(params=KINDS, scope="module")
def tokenizer(request):
    return KINDS[request.param]()


def streamed(tokenizer, parts):
    out = io.StringIO()
    stream = TextStream(tokenizer, out)
    for part in parts:
        stream.put(torch.tensor(part))
    stream.end()
    return out.getvalue()


def test_parts_make_the_whole(tokenizer):
    ids = Encoder(tokenizer).prompt(WORDS)
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert whole == WORDS
    for cut in range(len(ids) + 1):
        before = tokenizer.decode(ids[:cut], skip_special_tokens=True).rstrip("\ufffd")
        assert before + text_after(tokenizer, ids[:cut], ids[cut:]) == whole


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_stream_shows_the_whole(tokenizer, size):
    ids = Encoder(tokenizer).prompt(WORDS)
    parts = [ids[start : start + size] for start in range(0, len(ids), size)]
    assert streamed(tokenizer, parts) == WORDS + "\n"


def test_a_stream_shows_characters_as_soon_as_they_are_whole():
    out = io.StringIO()
    stream, seen = TextStream(byte_tokenizer(), out), []
    for byte in "a©漢".encode():
        stream.put(torch.tensor([byte]))
        seen.append(out.getvalue())
    assert seen == ["a", "a", "a©", "a©", "a©", "a©漢"]


def test_a_stream_shows_bytes_that_are_no_character():
    tokenizer = byte_tokenizer()
    ids = [*b"ab", 0xFF, 0xFF, 0xFF, 0xFF, *b"cd", 0xE6]
    assert streamed(tokenizer, [[token] for token in ids]) == tokenizer.decode(ids) + "\n"


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_characters_among_bytes_that_are_none(size):
    """However the tokens come, the text is that of all of them, and is never taken back."""
    tokenizer = byte_tokenizer()
    garbage = [0xFF, 0xE6, 0xB3, 0xF0, 0x9F, 0x98]
    ids = [*garbage, *"漢".encode(), *garbage, 0x80, *"a😀".encode(), *([0xFF] * 9), *b"z", 0xC3]
    pieces = TextPieces(tokenizer)
    parts = [pieces.put(ids[start : start + size]) for start in range(0, len(ids), size)]
    assert "".join([*parts, pieces.end()]) == tokenizer.decode(ids)


def test_a_long_run_of_bytes_that_are_no_character_is_shown():
    pieces = TextPieces(byte_tokenizer())
    shown = "".join(pieces.put([0xFF]) for _ in range(100))
    assert 90 < len(shown) <= 100 and len(shown + pieces.end()) == 100


@pytest.mark.parametrize(
    ("strings", "parts", "shown"),
    [
        ((), ["ab", "c"], ["ab", "c", ""]),
        (["xy"], ["axb", "x", "z"], ["axb", "", "xz", ""]),
        (["xy"], ["ax", "yb", "c"], ["a", "", "", ""]),
        (["abc", "b"], ["a", "bc"], ["", "", ""]),  # the earliest of them
        (["xyz"], ["xy"], ["", "xy"]),  # no stop string after all
        (["aab"], ["aa", "ab"], ["", "a", ""]),
    ],
)
def test_text_before_stops(strings, parts, shown):
    stops = TextBeforeStops(strings)
    assert [*map(stops.put, parts), stops.end()] == shown
    text = "".join(parts)
    assert stops.is_stopped == any(string in text for string in strings)


def test_a_stream_of_nothing_prints_nothing():
    assert streamed(byte_tokenizer(), []) == ""


def test_a_stop_string_may_begin_with_the_space_of_the_first_new_token(tokenizer):
    before, whole = (Encoder(tokenizer).prompt(text) for text in ("the cat", TEXT))
    tokens = whole[len(before) :]
    assert whole[: len(before)] == before
    kept = StopStrings(" sat", tokenizer).cut(before, tokens, len(tokens))
    assert text_after(tokenizer, before, tokens[:kept]) == " sat"
    assert StopStrings("cat sat", tokenizer).cut(before, tokens, len(tokens)) is None
