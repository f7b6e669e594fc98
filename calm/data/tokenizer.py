"""Tokenizers: bytes, byte-level BPE trained on the corpus, or any that transformers loads.

| name | vocabulary |
| --- | --- |
| ``bytes`` | 259: the 256 byte values as ids 0..255, then begin, end and pad of text |
| ``bpe:<n>`` | n entries of byte-level BPE trained on the documents at hand, special tokens first |
| anything else | a folder or hub name, with an end token and a pad token |
"""

import hashlib
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from calm.data.encoding import cut_at_spaces, vocabulary_size
from calm.data.files import without_mark
from calm.errors import UserError
from calm.integrity import check_files

__all__ = [
    "BPE_NAME",
    "BYTE_VOCAB_SIZE",
    "byte_tokenizer",
    "check_tokenizer",
    "load_tokenizer",
    "tokenizer_hash",
    "train_bpe_tokenizer",
]

logger = logging.getLogger(__name__)

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
PUBLISHED_PAD = "[PAD]"
BYTE_VOCAB_SIZE = 259
MAX_BPE_ENTRIES = 10_000_000

BYTES_NAME = "bytes"
BPE_NAME = re.compile(r"bpe:(\d+)")
UNBOUNDED = int(1e30)
TRAINING_LENGTH = 1 << 12  # characters; tokenizers holds 256 pieces with some 80 bytes a character


def _byte_symbols() -> list[str]:
    """The character by which byte-level tokenizers write each byte: the byte itself if printable,
    else one from 256 on.
    """
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), 256),
    }
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8, id = byte; begin 256, end 257, pad 258; decoding is exact."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    # Splitting into words changes no token, since the merge table is empty; it saves time.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return _as_pretrained(tokenizer)


def train_bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocab_size` entries learned from `texts`.

    Training is deterministic, and decoding restores any text exactly. Special tokens that a text
    spells out are left out of training: encoding turns them into the tokens that they are.

    Args:
        texts: documents to learn from.
        vocab_size: entries in total: 3 special tokens, 256 bytes and the merges. A small corpus may
            yield fewer.

    Raises:
        UserError: `vocab_size` leaves no room for the bytes and special tokens, or is absurd.
    """
    if not BYTE_VOCAB_SIZE <= vocab_size <= MAX_BPE_ENTRIES:
        is_small = vocab_size < BYTE_VOCAB_SIZE
        bound = f"at least {BYTE_VOCAB_SIZE}" if is_small else f"at most {MAX_BPE_ENTRIES}"
        raise UserError(f"tokenizer_name: bpe takes {bound} entries, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[BOS, EOS, PAD],
        show_progress=False,
    )
    special = re.compile("|".join(map(re.escape, (BOS, EOS, PAD))))
    parts = (part for text in texts for part in special.split(without_mark(text)))
    pieces = (piece for part in parts for piece in cut_at_spaces(part, TRAINING_LENGTH))
    tokenizer.train_from_iterator(pieces, trainer)
    return _as_pretrained(tokenizer)


def _as_pretrained(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=UNBOUNDED,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(
    name: str,
    *,
    argument: str = "tokenizer_name",
    texts: Iterable[str] | None = None,
    add_pad_token: bool = True,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedTokenizerBase:
    """The tokenizer called `name` (see the module's table), with an end and a pad token.

    Args:
        name: ``bytes``, ``bpe:<n>``, a folder or a hub name.
        argument: the flag that `name` comes from, for messages.
        texts: documents that ``bpe:<n>`` learns from.
        add_pad_token: append ``[PAD]`` to a tokenizer without pad token, as the published scripts
            do. The vocabulary grows by one. False makes a missing pad token an error.
        trust_remote_code: run code that comes with the tokenizer. Nothing else makes it run: a
            tokenizer that needs it is an error, and no question on standard input.
        options: passed on to `AutoTokenizer.from_pretrained`.

    Raises:
        UserError: no such tokenizer, files that are not those that were saved, nothing to train
            on, no end token, or no pad token where none may be appended.
    """
    if name == BYTES_NAME:
        return byte_tokenizer()
    if match := BPE_NAME.fullmatch(name):
        if texts is None:
            raise UserError(
                f"tokenizer_name: {name} is trained on documents, and there are none here"
            )
        return train_bpe_tokenizer(texts, int(match.group(1)))
    if name.partition(":")[0] == "bpe" and not Path(name).exists():
        raise UserError(f"{argument}: expected 'bpe:' and a number of entries, got {name!r}")
    try:
        check_files(name, only_small=True)
    except UserError as error:
        raise UserError(f"{argument}: {error}") from error
    if trust_remote_code:
        logger.warning("trust_remote_code: code that comes with %s may run here", name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name,
            trust_remote_code=trust_remote_code,
            local_files_only=Path(name).is_dir(),
            **options,
        )
    except Exception as error:  # libraries raise whatever a broken file happens to cause
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{argument}: the tokenizer {name!r} needs code of its own, which does not run "
                "unless you pass trust_remote_code; read that code first"
            ) from error
        raise UserError(
            f"{argument}: cannot load a tokenizer from {name!r} ({error}); pass tokenizer_name: "
            f"a folder with a tokenizer, a hub name, {BYTES_NAME!r} or 'bpe:4096'"
        ) from error
    return check_tokenizer(tokenizer, name, add_pad_token=add_pad_token)


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, name: str, *, add_pad_token: bool = True
) -> PreTrainedTokenizerBase:
    """`tokenizer` with an end and a pad token; `add_pad_token` appends a missing pad token."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer_name: {name} has no end token, so documents cannot be told apart; set one "
            "and save the tokenizer: tokenizer.add_special_tokens({'eos_token': ...})"
        )
    if tokenizer.pad_token_id is None:
        advice = "set one and save the tokenizer: tokenizer.pad_token = ..."
        if not add_pad_token:
            raise UserError(
                f"tokenizer_name: {name} has no pad token, and add_pad_token is off; {advice}"
            )
        used = set(tokenizer.get_vocab().values())
        tokenizer.add_special_tokens({"pad_token": PUBLISHED_PAD})
        if tokenizer.pad_token_id in used:  # ids with holes: the count is no free id
            raise UserError(
                f"tokenizer_name: {name} has no pad token, and its ids have holes, so that "
                f"{PUBLISHED_PAD} got the id {tokenizer.pad_token_id} of another token; {advice}"
            )
        logger.info(
            "%s has no pad token: appended %s, the vocabulary has %d entries now; to avoid this %s",
            name,
            PUBLISHED_PAD,
            vocabulary_size(tokenizer),
            advice,
        )
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what `tokenizer` does, the same in every process: for cache keys and protocols."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        content = tokenizer.backend_tokenizer.to_str()
    else:
        content = repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
