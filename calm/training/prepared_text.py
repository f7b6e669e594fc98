"""The prepared text of a training job, and how a model reads blocks of any text."""

from typing import NamedTuple, Self

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calm.data.manifest import TRAIN, is_prepared
from calm.data.packing import check_block_size
from calm.data.prepared import PreparedBlocks, PreparedText, ShuffledBlocks
from calm.data.shards import Layout
from calm.data.tokenizer import tokenizer_hash
from calm.errors import UserError
from calm.training.arguments import JobArguments

__all__ = ["BlockLayout", "find_prepared", "prepared_blocks"]


class BlockLayout(NamedTuple):
    """How a model reads blocks: K, and the token of the chunk before each document, if any."""

    patch_size: int
    start_token_id: int | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """The layout of `model`. Autoencoder and baseline have no chunk between documents."""
        return cls(getattr(model, "patch_size", 1), getattr(model, "start_token_id", None))


def find_prepared(arguments: JobArguments) -> PreparedText | None:
    """The folder of `calm prepare` that ``train_file`` names, or None.

    Raises:
        UserError: see `PreparedText`; other flags name another text, or hold out another share.
    """
    data = arguments.data
    if is_prepared(data.validation_file):
        raise UserError(
            f"validation_file: {data.validation_file} is a prepared text; name it by train_file, "
            "and what it holds out is evaluated on without validation_file"
        )
    if not is_prepared(data.train_file):
        return None
    if data.streaming:
        raise UserError(f"train_file: {data.train_file} is a prepared text; take streaming out")
    if data.dataset_name:
        raise UserError("dataset_name and train_file/validation_file exclude each other; pass one")
    prepared = PreparedText(str(data.train_file))
    asked, made = data.validation_split_percentage, prepared.description.validation_split_percentage
    if asked != made and data.validation_file is None:
        raise UserError(
            f"validation_split_percentage: {data.train_file} was prepared with {made:g} % held "
            f"out, got {asked:g}; pass {made:g}, prepare it again, or pass validation_file"
        )
    return prepared


def prepared_blocks(
    arguments: JobArguments,
    prepared: PreparedText,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    layout: BlockLayout,
    max_blocks: int | None,
) -> PreparedBlocks | ShuffledBlocks:
    """Blocks of a split; those to train on in the order of the seed.

    With ``train_sampling_strategy=sequential`` they come in the order of the text.

    Args:
        arguments: of the job.
        prepared: the text.
        tokenizer: of the model.
        split: ``train`` or ``validation``.
        layout: of the model.
        max_blocks: keep this many, at most.

    Raises:
        UserError: the text was prepared for another tokenizer or K; see `PreparedBlocks`.
    """
    check_block_size(arguments.block_size, layout.patch_size)
    prepared.check(tokenizer_hash(tokenizer), layout.start_token_id, layout.patch_size)
    start, end = layout.start_token_id, tokenizer.eos_token_id
    blocks = prepared.blocks(
        split,
        block_size=arguments.block_size,
        pad_token_id=tokenizer.pad_token_id,
        layout=None if start is None else Layout(start, end, layout.patch_size),
        max_blocks=max_blocks,
    )
    training = arguments.training
    if split != TRAIN:
        return blocks
    if training.train_sampling_strategy == "sequential":
        if prepared.description.weights is not None:
            raise UserError(
                f"train_sampling_strategy=sequential has no place for the weights of "
                f"{prepared.folder}: take it out"
            )
        return blocks
    seed = training.seed if training.data_seed is None else training.data_seed
    return ShuffledBlocks(blocks, seed)
