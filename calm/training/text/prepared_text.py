"""The prepared text of a training job, and how a model reads blocks of any text."""

import shlex
from typing import NamedTuple, NoReturn, Self

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calm.data.manifest import TRAIN, is_prepared
from calm.data.order import ShuffledBlocks
from calm.data.prepared import PreparedBlocks, PreparedText
from calm.errors import UserError
from calm.training.flags.arguments import DataTrainingArguments, JobArguments

__all__ = ["BlockLayout", "find_held_out", "find_prepared", "prepared_blocks"]


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
        UserError: see `PreparedText`; other flags name another text, or hold out another share;
            ``require_prepared``, and the text to learn from is neither prepared nor a stream.
    """
    data = arguments.data
    if not is_prepared(data.train_file):
        if data.require_prepared and arguments.training.do_train and not data.streaming:
            _refuse_unprepared(data)
        return None
    if data.dataset_name:
        raise UserError("dataset_name and train_file/validation_file exclude each other; pass one")
    prepared = PreparedText(str(data.train_file))
    if data.validation_file is None:
        prepared.check_held_out(data.validation_split_percentage)
    return prepared


def _refuse_unprepared(data: DataTrainingArguments) -> NoReturn:
    text = data.train_file or data.dataset_name
    raise UserError(
        "require_prepared: "
        + (f"{text} is no folder of calm prepare" if text else "no text is named")
        + f": run calm prepare --data {shlex.quote(text or 'TEXT')} --tokenizer NAME --output "
        "FOLDER and pass --train_file FOLDER; or pass --streaming to tokenize the text during "
        "training, or --require_prepared=false to tokenize all of it first"
    )


def find_held_out(arguments: JobArguments, prepared: PreparedText | None) -> PreparedText | None:
    """The folder whose held-out documents are evaluated on, or None.

    Args:
        arguments: of the job.
        prepared: what `find_prepared` has found.

    Raises:
        UserError: see `PreparedText`; dataset_name names another text.
    """
    data = arguments.data
    if data.validation_file is None:
        return prepared
    if not is_prepared(data.validation_file):
        return None
    if data.dataset_name:
        raise UserError("dataset_name and train_file/validation_file exclude each other; pass one")
    return PreparedText(data.validation_file)


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
        UserError: see `PreparedText.blocks_for`.
    """
    blocks = prepared.blocks_for(
        tokenizer,
        split,
        block_size=arguments.block_size,
        max_blocks=max_blocks,
        **layout._asdict(),
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
