r"""After stage two: a CALM learns from what another language model draws.

    python -m calm.training.distill --config demo --model_name_or_path runs/demo/calm \
        --teacher_name_or_path runs/demo/baseline --output_dir runs/demo/distilled

`calm distill` is the same. ``torchrun -m`` instead of ``python -m`` trains on several devices. The
teacher is a token baseline, or a CALM whose chunks fit into the student's a whole number of times.
"""

import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calm.data.tokenizer import load_tokenizer, tokenizer_hash
from calm.errors import UserError
from calm.memory import check_draws
from calm.models import MODEL_CLASSES, BaselineTransformer, EnergyTransformer
from calm.models.loading import load_kind
from calm.training import train_calm
from calm.training.building import load_pretrained
from calm.training.flags.arguments import JobArguments
from calm.training.flags.recipe import Stage
from calm.training.job import run_stage
from calm.training.objectives.distilling import DistillationArguments, DistillationObjective
from calm.training.objectives.teachers import ChunkTeacher, Documents, Teacher, TokenTeacher

__all__ = ["build_model", "load_teacher", "main"]

logger = logging.getLogger(__name__)

ARGUMENT = "teacher_name_or_path"


def build_model(arguments: JobArguments, tokenizer: PreTrainedTokenizerBase) -> EnergyTransformer:
    """The CALM at ``model_name_or_path``, which learns from its teacher; all of it does."""
    loaded = train_calm.build_model(arguments, tokenizer)
    model = train_calm.with_energy_head(loaded, arguments, use="learn from draws")
    _check_contexts(arguments, model)
    chunks = arguments.batch_tokens // model.patch_size
    check_draws(model, "teacher_draws", arguments.options.teacher_draws, chunks)
    documents = Documents(model.start_token_id, tokenizer.eos_token_id)
    teacher = load_teacher(arguments, model, tokenizer, documents)
    if model.token_readout is not None:
        logger.warning("the student's readout of tokens would not fit any more: it is left out")
        model.token_readout = None
        model.config.token_loss_weight, model.config.keep_token_readout = 0.0, False
    model.objective = DistillationObjective(arguments.options, teacher, documents)
    return model


def _check_contexts(arguments: JobArguments, model: EnergyTransformer) -> None:
    """The student can write texts of its own, if it shall."""
    options: DistillationArguments = arguments.options
    if options.contexts != "student":
        return
    if arguments.training.is_sharded:
        raise UserError("contexts=student needs whole matrices to generate, and fsdp splits them")
    least = (2 + (model.start_token_id is not None)) * model.patch_size
    if arguments.block_size < least:
        raise UserError(
            f"block_size must be at least {least} with contexts=student: a prompt of one chunk of "
            f"{model.patch_size} tokens and one to draw; got {arguments.block_size}"
        )


def load_teacher(
    arguments: JobArguments,
    student: EnergyTransformer,
    tokenizer: PreTrainedTokenizerBase,
    documents: Documents,
) -> Teacher:
    """The teacher that ``teacher_name_or_path`` names, frozen and where training runs.

    Args:
        arguments: of the job.
        student: the model that learns.
        tokenizer: of the student.
        documents: of the student's text.

    Raises:
        UserError: no such model, no language model, another tokenizer or vocabulary, chunks that
            do not fit, a context that ends before a block does.
    """
    name = arguments.model.teacher_name_or_path
    if not name:
        raise UserError(
            f"{ARGUMENT} is needed: the folder of a trained token baseline, or of a CALM of "
            "smaller chunks"
        )
    source: Any = {
        "revision": arguments.model.model_revision,
        "token": arguments.model.token,
        "cache_dir": arguments.model.cache_dir,
    }
    kind = load_kind(name, ARGUMENT, **source)
    if kind not in (*MODEL_CLASSES, "baseline"):
        raise UserError(
            f"{ARGUMENT} must be a language model, a CALM or a token baseline; {name} holds "
            f"{'an autoencoder' if kind == 'autoencoder' else f'a model of type {kind!r}'}"
        )
    _check_tokenizer(arguments, tokenizer, _tokenizer_of(arguments, name, source))
    model_class: Any = MODEL_CLASSES.get(kind, BaselineTransformer)
    model: Any = load_pretrained(model_class, name, arguments.model, ARGUMENT)
    _check_vocabulary(name, model, student)
    _check_context(name, model, arguments.block_size)
    model = model.to(arguments.training.device).requires_grad_(False).eval()
    if kind == "baseline":
        return TokenTeacher(model, documents)
    _check_chunks(name, model, student)
    return ChunkTeacher(model, documents)


def _tokenizer_of(arguments: JobArguments, name: str, source: Any) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer, which its folder must hold."""
    if Path(name).is_dir() and not list(Path(name).glob("tokenizer*")):
        raise UserError(
            f"{ARGUMENT}: {name} holds no tokenizer, so that nobody can tell whether it is the "
            "student's: save it there"
        )
    model = arguments.model
    return load_tokenizer(
        name, argument=ARGUMENT, add_pad_token=model.add_pad_token,
        use_fast=model.use_fast_tokenizer, trust_remote_code=model.trust_remote_code, **source,
    )  # fmt: skip


def _check_tokenizer(
    arguments: JobArguments, own: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase
) -> None:
    """Teacher and student have one tokenizer."""
    if tokenizer_hash(own) == tokenizer_hash(other):
        return
    model = arguments.model
    raise UserError(
        f"{ARGUMENT}: the tokenizer of {model.teacher_name_or_path} differs from that of the "
        f"student, {model.tokenizer_name or model.model_name_or_path}: {_difference(other, own)}; "
        "what a teacher draws are tokens, so both must be trained with one tokenizer"
    )


def _difference(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> str:
    """How two tokenizers differ, the first thing that does."""
    theirs, ours = teacher.get_vocab(), student.get_vocab()
    if len(theirs) != len(ours):
        return f"it has {len(theirs)} entries, the student's {len(ours)}"
    for token, index in sorted(ours.items(), key=lambda entry: entry[1]):
        if theirs.get(token) != index:
            there = f"{theirs[token]} there" if token in theirs else "unknown there"
            return f"the token {token!r} is {there} and {index} here"
    for name in ("bos_token", "eos_token", "pad_token"):
        if getattr(teacher, name) != getattr(student, name):
            return f"its {name} is {getattr(teacher, name)!r}, here {getattr(student, name)!r}"
    return "they have the same entries and split texts by other rules"


def _check_vocabulary(name: str, teacher: PreTrainedModel, student: EnergyTransformer) -> None:
    sizes = teacher.config.vocab_size, student.config.vocab_size
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{ARGUMENT}: {name} has a vocabulary of {sizes[0]} tokens, the student one of "
            f"{sizes[1]}: they must be equal"
        )


def _check_context(name: str, teacher: Any, block_size: int) -> None:
    reach = teacher.config.max_position_embeddings * getattr(teacher, "patch_size", 1)
    if reach < block_size:
        raise UserError(
            f"{ARGUMENT}: {name} reads {reach} tokens, and a block has {block_size}: pass a "
            "smaller block_size"
        )


def _check_chunks(name: str, teacher: Any, student: EnergyTransformer) -> None:
    """The teacher's chunks fill the student's, and both see documents begin alike."""
    if student.patch_size % teacher.patch_size:
        raise UserError(
            f"{ARGUMENT}: {name} draws chunks of {teacher.patch_size} tokens, which do not fill "
            f"the student's chunks of {student.patch_size}: patch_size of the student must be a "
            "multiple of the teacher's"
        )
    if teacher.start_token_id != student.start_token_id:
        raise UserError(
            f"{ARGUMENT}: the start chunk of {name} has token {teacher.start_token_id}, the "
            f"student's {student.start_token_id} (None: has_start_patch is false): both must "
            "read documents alike"
        )


def main(argv: list[str] | None = None) -> int:
    """Train the student; the exit status."""
    return run_stage(Stage.DISTILLATION, build_model, argv)


if __name__ == "__main__":
    raise SystemExit(main())
