"""Text to token ids: one rule for training, evaluation, generation and BPE training.

The rule is that of the published code, which calls the tokenizer plainly:

- A special token that a text spells out becomes that token, in documents and in prompts. So chat
  markers that were written in training are found again in a prompt.
- What the tokenizer adds by itself, such as Llama's begin token, stays. It is not added a second
  time to a text that spells it out, as the result of a chat template does.
- Every document ends with the end token, so that its end can be learned. The published scripts add
  one for the autoencoder alone; with Llama's tokenizer, which adds only a begin token, their
  language models never see where a document ends.
- A prompt has no end: the end token that some tokenizers add is dropped.
- A byte-order mark at the beginning of a text is dropped.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from calm.data.files import without_mark
from calm.errors import UserError

__all__ = ["Encoder", "cut_at_spaces", "document_separator", "vocabulary_size"]

SAMPLE = "a"  # shows what a tokenizer adds to a text
# Encoding takes some 250 bytes of memory for a token. Both are in characters.
PIECE_LENGTH = 1 << 16
CALL_LENGTH = 1 << 18
# Where a text may be cut, see `_cuts_at_spaces`.
SAFE_CUT = re.compile(r"[A-Za-z0-9](?=[ \n])|\w(?= )")
# How Llama 3 and Qwen 2 split text into words.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """V, rows that an embedding needs: the largest id and one. Ids may have holes."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def document_separator(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The end token that follows every document, or None if `tokenizer` adds it by itself."""
    end = Encoder(tokenizer).end
    return None if end[-1:] == [tokenizer.eos_token_id] else tokenizer.eos_token_id


class Encoder:
    """A tokenizer with the rule of this module.

    A long text is cut before it is encoded where that provably changes no token, see
    `_cuts_at_spaces`; memory is then bounded. Another tokenizer needs some 250 bytes for a byte of
    the longest document.

    Args:
        tokenizer: any of transformers'.

    Attributes:
        begin: ids that the tokenizer puts before every text.
        end: ids that it puts after every text.

    Raises:
        UserError: the tokenizer does something else to a text than to add tokens at its ends.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        plain, whole = (
            tokenizer(SAMPLE, add_special_tokens=adds)["input_ids"] for adds in (False, True)
        )
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                break
        else:
            raise UserError(
                f"the tokenizer turns {SAMPLE!r} into {whole}, and without special tokens into "
                f"{plain}: tokens may be added before and after a text alone"
            )
        self.begin: list[int] = whole[:start]
        self.end: list[int] = whole[start + len(plain) :]
        self._is_cut = _cuts_at_spaces(tokenizer)

    def documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Each text as a document, int32: with its end token; nothing for an empty text."""
        eos = self.tokenizer.eos_token_id
        found = []
        for text, ids in zip(texts, self._encode(texts), strict=True):
            before = [] if self._starts(ids) else self.begin
            after = [] if self.end and ids[-len(self.end) :].tolist() == self.end else self.end
            last = [*ids[-1:].tolist(), *after][-1:]
            added = [*after, *([] if last == [eos] else [eos])]
            document = np.concatenate([before, ids, added]) if text else ids
            found.append(document.astype(np.int32))
        return found

    def prompt(self, text: str) -> list[int]:
        """A text that goes on."""
        (ids,) = self._encode([text])
        return [*([] if self._starts(ids) else self.begin), *ids.tolist()]

    def _starts(self, ids: np.ndarray) -> bool:
        """Whether `ids` have the tokenizer's begin already."""
        return ids[: len(self.begin)].tolist() == self.begin

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text without what the tokenizer adds; no call takes much memory."""
        length = PIECE_LENGTH if self._is_cut else None
        pieces = [list(cut_at_spaces(without_mark(text), length)) for text in texts]
        ids = [found for call in _calls(chain(*pieces)) for found in self._call(call)]
        ends = [0, *accumulate(map(len, pieces))]
        return [np.concatenate(ids[first:last]) for first, last in pairwise(ends)]

    def _call(self, texts: list[str]) -> Iterator[np.ndarray]:
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            verbose=False,  # a text may be longer than a model reads
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        for ids in encoded["input_ids"]:
            yield np.array(ids, dtype=np.int32)


def cut_at_spaces(text: str, length: int | None) -> Iterator[str]:
    """`text` in pieces of some `length` characters, in one piece if None; see `_cuts_at_spaces`."""
    start = 0
    while length and len(text) - start > length:
        cut = SAFE_CUT.search(text, start + length)
        if cut is None:
            break
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def _calls(pieces: Iterable[str]) -> Iterator[list[str]]:
    """Groups of pieces that are encoded together: of some `CALL_LENGTH`, at least one piece."""
    group: list[str] = []
    length = 0
    for piece in pieces:
        if group and length + len(piece) > CALL_LENGTH:
            yield group
            group, length = [], 0
        group.append(piece)
        length += len(piece)
    if group:
        yield group


def _cuts_at_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text may be cut where `SAFE_CUT` matches, without a change of its ids.

    True of byte-level tokenizers that split text as GPT-2, Llama 3 or Qwen 2 do, and change it in
    no other way. Their words never go on from a letter or digit to a space or line break, and how a
    word is split off does not depend on what stands before it. A letter or digit alone may come
    before a line break: Llama 3 joins punctuation to the line break that follows.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return False
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is not None or getattr(backend.model, "dropout", None):
        return False
    added = backend.get_added_tokens_decoder().values()
    if any(re.search(r"\s", token.content) or token.lstrip or token.rstrip for token in added):
        return False
    if backend.pre_tokenizer is None:
        return False
    return _splits_words(json.loads(backend.pre_tokenizer.__getstate__()))


def _splits_words(state: dict[str, Any]) -> bool:
    """Whether the state of a pre-tokenizer is one of those `_cuts_at_spaces` knows."""
    if state["type"] == "Sequence":
        split, *rest = state["pretokenizers"]
        return (
            split["type"] == "Split"
            and split["pattern"].get("Regex") in WORDS
            and split["behavior"] == "Isolated"
            and not split["invert"]
            and len(rest) == 1
            and _is_byte_level(rest[0], splits=False)
        )
    return _is_byte_level(state, splits=True)


def _is_byte_level(state: dict[str, Any], *, splits: bool) -> bool:
    return (
        state["type"] == "ByteLevel"
        and state["use_regex"] is splits
        and not state["add_prefix_space"]
    )
