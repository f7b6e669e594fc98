"""The text of a training job: documents, tokenizer, blocks, and a record of all three."""

import logging
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calm.data.corpus import Corpus, load_corpus
from calm.data.encoding import document_separator, vocabulary_size
from calm.data.files import expand_files
from calm.data.manifest import TRAIN, VALIDATION, is_prepared
from calm.data.options import TOKENIZER_DOCUMENTS, CorpusOptions
from calm.data.order import ShuffledBlocks
from calm.data.packing import PackedBlocks, pack_documents
from calm.data.prepared import PreparedBlocks, PreparedText
from calm.data.reading import TEXT_KEY
from calm.data.stream import PackedStream
from calm.data.tables import Documents
from calm.data.tokenizer import BPE_NAME, load_tokenizer, tokenizer_hash
from calm.errors import UserError
from calm.integrity import weights_hash
from calm.training.checkpoints.resume import model_settings, read_protocol
from calm.training.flags.arguments import NO_AUTOENCODER, JobArguments
from calm.training.flags.recipe import Stage
from calm.training.text.prepared_text import (
    BlockLayout,
    find_held_out,
    find_prepared,
    prepared_blocks,
)

__all__ = ["Blocks", "Text", "load_text", "pack_text", "protocol"]

logger = logging.getLogger(__name__)

# Settings of training that the protocol records.
RECORDED = """
learning_rate muon_learning_rate lr_scheduler_type warmup_steps adam_beta1 adam_beta2 adam_epsilon
weight_decay max_grad_norm per_device_train_batch_size gradient_accumulation_steps world_size
max_steps num_train_epochs max_train_seconds bf16 fp16 tf32 lr_scheduler_kwargs data_seed
optim_args neftune_noise_alpha dataloader_drop_last train_sampling_strategy ignore_data_skip
max_gradient_spike on_spike
"""

Packed = PackedBlocks | PackedStream | PreparedBlocks | ShuffledBlocks


@dataclass(frozen=True)
class Text:
    """Documents and their tokenizer.

    Attributes:
        corpus: documents that are not prepared.
        tokenizer: of all of them.
        tokenizer_name: as the flags have it.
        prepared: the folder that ``train_file`` names, if it is one.
        held_out: the folder whose held-out documents are evaluated on, if there is one.
    """

    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase
    tokenizer_name: str
    prepared: PreparedText | None = None
    held_out: PreparedText | None = None

    @property
    def skipped(self) -> int | None:
        """Documents that could not be read; None for a stream."""
        if self.corpus.skipped is None:
            return None
        folders = {each.folder: each for each in (self.prepared, self.held_out) if each}
        return self.corpus.skipped + sum(each.description.skipped for each in folders.values())


@dataclass(frozen=True)
class Blocks:
    """Packed documents for training and for evaluation; None where a job does without."""

    train: Packed | None
    validation: Packed | None


def load_text(arguments: JobArguments, checkpoint: Path | None = None) -> Text:
    """Documents and tokenizer that `arguments` name.

    Args:
        arguments: of the job.
        checkpoint: what the job takes over. ``bpe:<n>`` is then the tokenizer saved there: one
            learned from the text again would give other ids as soon as the text has changed.

    Raises:
        UserError: see `load_corpus` and `load_tokenizer`; no text for what is to be done.
    """
    model, training = arguments.model, arguments.training
    prepared = find_prepared(arguments)
    held_out = find_held_out(arguments, prepared)
    corpus = _load_corpus(arguments.corpus, prepared, held_out)
    if training.do_train and corpus.train is None and prepared is None:
        raise UserError("there is no text to train on: pass train_file or dataset_name")
    is_held_out = held_out is not None and held_out.description.of_split(VALIDATION)
    if training.do_eval and corpus.validation is None and not is_held_out:
        raise UserError(
            "there is no text to evaluate on: pass validation_file, or a "
            "validation_split_percentage above 0"
        )
    argument, name = _tokenizer_source(arguments)
    is_saved = checkpoint is not None and read_protocol(checkpoint).get("tokenizer") == name
    tokenizer = load_tokenizer(
        str(checkpoint) if is_saved and BPE_NAME.fullmatch(name) else name,
        argument=argument,
        texts=_texts(corpus.train),
        add_pad_token=model.add_pad_token,
        use_fast=model.use_fast_tokenizer,
        cache_dir=model.cache_dir,
        revision=model.model_revision,
        token=model.token,
        trust_remote_code=model.trust_remote_code,
    )
    return Text(corpus, tokenizer, name, prepared, held_out)


def _load_corpus(
    options: CorpusOptions, prepared: PreparedText | None, held_out: PreparedText | None
) -> Corpus:
    """The documents that are not prepared."""
    if held_out is not None:
        if prepared is not None or options.train_file is None:
            return Corpus(None, None)
        return load_corpus(replace(options, validation_file=None, validation_split_percentage=0))
    return load_corpus(options if prepared is None else replace(options, train_file=None))


def _tokenizer_source(arguments: JobArguments) -> tuple[str, str]:
    """The flag that names the tokenizer, and its value."""
    for argument in ("tokenizer_name", "model_name_or_path", "ae_name_or_path"):
        if name := getattr(arguments.model, argument):
            return argument, name
    if arguments.stage is Stage.CALM:
        raise UserError(NO_AUTOENCODER)
    if is_prepared(arguments.data.train_file):
        return "train_file", str(arguments.data.train_file)
    raise UserError("tokenizer_name is needed: a folder, a hub name, 'bytes' or 'bpe:4096'")


def _texts(documents: Documents | None) -> Any:
    if documents is None:
        return None
    return (row[TEXT_KEY] for row in islice(documents, TOKENIZER_DOCUMENTS))


def pack_text(arguments: JobArguments, text: Text, layout: BlockLayout) -> Blocks:
    """Blocks of the documents. Streams for training repeat without end."""
    training, data = arguments.training, arguments.data

    def pack(split: str, documents: Documents | None, limit: int | None) -> Any:
        is_train = split == TRAIN
        if not (training.do_train if is_train else training.do_eval):
            return None
        if documents is None:
            prepared = text.prepared if is_train else text.held_out
            return prepared and prepared_blocks(
                arguments, prepared, text.tokenizer, split, layout, limit
            )
        return pack_documents(
            documents,
            text.tokenizer,
            block_size=arguments.block_size,
            patch_size=layout.patch_size,
            start_token_id=layout.start_token_id,
            max_blocks=limit,
            repeat=is_train,
            lanes=data.stream_lanes if is_train else 1,
            num_proc=data.preprocessing_num_workers,
            overwrite_cache=data.overwrite_cache,
        )

    return Blocks(
        pack(TRAIN, text.corpus.train, data.max_train_samples),
        pack(VALIDATION, text.corpus.validation, data.max_eval_samples),
    )


def protocol(
    arguments: JobArguments, text: Text, blocks: Blocks, model: PreTrainedModel
) -> dict[str, Any]:
    """A record of the job to save beside the weights; it names files without their folders.

    `calm.training.checkpoints.resume` compares it with the record of the run that a job takes over.
    """
    training, data, layout = arguments.training, arguments.data, BlockLayout.of(model)
    autoencoder = getattr(model, "ae_model", None)
    taught: Any = getattr(model, "alignment", None) or getattr(model, "objective", None)
    teacher = getattr(taught, "teacher", None)
    return {
        "stage": arguments.stage.value,
        "block_size": arguments.block_size,
        **layout._asdict(),
        "tokenizer": Path(text.tokenizer_name).name,
        "tokenizer_hash": tokenizer_hash(text.tokenizer),
        "vocab_size": vocabulary_size(text.tokenizer),
        "document_separator": document_separator(text.tokenizer),
        "dataset": data.dataset_name and Path(data.dataset_name).name,
        "train_files": _file_names(data.train_file),
        "validation_files": _file_names(data.validation_file),
        "validation_split_percentage": data.validation_split_percentage,
        "on_error": data.on_error,
        "skipped_documents": text.skipped,
        "train": _describe(blocks.train, data.train_file),
        "validation": _describe(blocks.validation, data.validation_file),
        "autoencoder": None if autoencoder is None else weights_hash(autoencoder),
        "teacher": None if teacher is None else weights_hash(getattr(teacher, "model", teacher)),
        "model": model_settings(model),
        "weight_dtype": str(model.dtype).removeprefix("torch."),
        # torch's version decides whether transformers takes the fused form of AdamW.
        "optimizer": "muon"
        if training.muon_learning_rate
        else str(getattr(training.optim, "value", training.optim)).removesuffix("_fused"),
        "seed": training.seed,
        "eval_seed": training.eval_seed,
        "eval_num_samples": training.eval_num_samples,
        "training": {name: getattr(training, name) for name in RECORDED.split()},
        # Such a stage goes on from a model, which what it learns may refer to.
        **(
            {"options": asdict(arguments.options), "source": weights_hash(model)}
            if arguments.options
            else {}
        ),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
    }


def _file_names(patterns: str | None) -> list[str] | None:
    if is_prepared(patterns):
        return [Path(str(patterns)).name]
    return [Path(file).name for file in expand_files(patterns)] if patterns else None


def _describe(blocks: Packed | None, patterns: str | None) -> dict[str, Any] | None:
    if blocks is None:
        return None
    if isinstance(blocks, PackedStream):  # too long to be read for a hash
        sizes = [Path(file).stat().st_size for file in expand_files(patterns)] if patterns else []
        size = {"files": len(sizes), "bytes": sum(sizes)}
        return {"streaming": True, **size, "lanes": blocks.lanes}
    return {
        "streaming": False,
        "blocks": len(blocks),
        "tokens": blocks.num_tokens,
        "tokens_per_character": round(blocks.tokens_per_character, 4),
        "data_hash": blocks.data_hash(),
    }
