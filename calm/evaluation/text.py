"""The blocks of a text that a model is scored on."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calm.data.corpus import load_corpus
from calm.data.options import SCORED_BLOCK_SIZE, CorpusOptions
from calm.data.packing import PackedBlocks, pack_documents
from calm.errors import UserError

__all__ = ["scored_blocks"]


def scored_blocks(
    options: CorpusOptions,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int | None = None,
    max_blocks: int | None = None,
) -> tuple[PackedBlocks, int | None]:
    """The documents that training with these options holds out, or all if it holds none out.

    Args:
        options: which text.
        model: gives the layout of blocks: chunk size, start chunk, context.
        tokenizer: of the model.
        block_size: tokens of a block; None for the model's context, 2048 at most.
        max_blocks: the first ones only.

    Returns: blocks, and how many documents were skipped as unreadable.
    """
    corpus = load_corpus(options)
    is_held_out = options.validation_split_percentage > 0 or corpus.train is None
    patch_size = getattr(model, "patch_size", 1)
    blocks: Any = pack_documents(
        corpus.validation if is_held_out else corpus.train,
        tokenizer,
        block_size=_block_size(block_size, model.config.max_position_embeddings * patch_size),
        patch_size=patch_size,
        start_token_id=getattr(model, "start_token_id", None),
        max_blocks=max_blocks,
    )
    return blocks, corpus.skipped


def _block_size(wanted: int | None, context: int) -> int:
    """The block size, within the model's context."""
    if wanted is None:
        return min(SCORED_BLOCK_SIZE, context)
    if wanted > context:
        raise UserError(f"--block-size {wanted} exceeds the model's context of {context} tokens")
    return wanted
