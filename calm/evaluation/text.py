"""The blocks of a text that a model is scored on."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calm.data.corpus import load_corpus
from calm.data.manifest import VALIDATION, is_prepared
from calm.data.options import SCORED_BLOCK_SIZE, CorpusOptions
from calm.data.packing import PackedBlocks, pack_documents
from calm.data.prepared import PreparedBlocks, PreparedText
from calm.errors import UserError

__all__ = ["scored_blocks"]


def scored_blocks(
    options: CorpusOptions,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int | None = None,
    max_blocks: int | None = None,
) -> tuple[PackedBlocks | PreparedBlocks, int | None]:
    """The documents that training with these options holds out, or all if it holds none out.

    Args:
        options: which text; of a prepared one only what it holds out is scored.
        model: gives the layout of blocks: chunk size, start chunk, context.
        tokenizer: of the model.
        block_size: tokens of a block; None for the model's context, 2048 at most.
        max_blocks: the first ones only.

    Returns: blocks, and how many documents were skipped as unreadable.

    Raises:
        UserError: see `load_corpus` and `PreparedText.blocks_for`; a block beyond the context.
    """
    patch_size = getattr(model, "patch_size", 1)
    layout: Any = {
        "block_size": _block_size(block_size, model.config.max_position_embeddings * patch_size),
        "patch_size": patch_size,
        "start_token_id": getattr(model, "start_token_id", None),
        "max_blocks": max_blocks,
    }
    if (prepared := _prepared(options)) is not None:
        blocks = prepared.blocks_for(tokenizer, VALIDATION, **layout)
        return blocks, prepared.description.skipped
    corpus = load_corpus(options)
    is_held_out = options.validation_split_percentage > 0 or corpus.train is None
    documents: Any = corpus.validation if is_held_out else corpus.train
    packed: Any = pack_documents(documents, tokenizer, **layout)
    return packed, corpus.skipped


def _prepared(options: CorpusOptions) -> PreparedText | None:
    """The prepared text that is scored, or None."""
    if options.validation_file is not None:
        folder = options.validation_file
        return PreparedText(folder) if is_prepared(folder) else None
    if not is_prepared(options.train_file):
        return None
    prepared = PreparedText(str(options.train_file))
    prepared.check_held_out(options.validation_split_percentage)
    return prepared


def _block_size(wanted: int | None, context: int) -> int:
    """The block size, within the model's context."""
    if wanted is None:
        return min(SCORED_BLOCK_SIZE, context)
    if wanted > context:
        raise UserError(f"--block-size {wanted} exceeds the model's context of {context} tokens")
    return wanted
