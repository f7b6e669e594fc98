"""Small tokenizers built as those of known models are."""

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from calm.data.encoding import WORDS

BEGIN, END, PAD, CHAT = "<s>", "</s>", "<pad>", "<|user|>"
SPECIAL = {"bos_token": BEGIN, "eos_token": END, "pad_token": PAD}
TEXT = "the cat sat on the mat, and 3 more cats sat.\nIt's 12345 o'clock\n\n  well "


def _wrap(tokenizer, template):
    """`tokenizer` trained on `TEXT`, with the special tokens, which `template` adds to a text."""
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT, "©漢"] * 9, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in (BEGIN, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    tokenizer.add_special_tokens([AddedToken(CHAT)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def gpt2_like(template="$A"):
    """Byte-level, split into words as GPT-2 does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer, template)


def llama3_like(template=f"{BEGIN} $A", words=WORDS[0]):
    """Byte-level with a begin token, split into words as Llama 3 does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer, template)


def llama2_like(template=f"{BEGIN} $A"):
    """Sentencepiece-like: a space before every text, and none before a decoded one."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token=PAD))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return _wrap(tokenizer, template)
