"""One training job of any stage: text, tokenizer, model, training, evaluation, files.

A job writes ``output_dir``: the final weights with configuration, tokenizer and ``protocol.json``
(what `calm eval` and `calm generate` load), a model card ``README.md``, ``train_results.json``,
``eval_results.json``, ``trainer_state.json`` with the logs, and ``checkpoint-<step>`` folders.
Started again with the same ``output_dir``, it resumes from the last good checkpoint if its settings
are the same (`calm.training.checkpoints.resume`); ``--overwrite_output_dir`` starts afresh,
``--resume_from_checkpoint <folder>`` chooses a checkpoint. One job at a time may train in a folder.
"""

import atexit
import logging
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from torch import distributed
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils.logging import disable_progress_bar

from calm.errors import UserError, run_program
from calm.memory import check_draws
from calm.training.building import check_context, weight_dtype
from calm.training.checkpoints.complete import (
    check_usable,
    discard_checkpoints,
    last_good_checkpoint,
    set_aside_later,
)
from calm.training.checkpoints.lock import locked
from calm.training.checkpoints.resume import Takeover, check_output_folder
from calm.training.flags.arguments import (
    CALMTrainingArguments,
    JobArguments,
    parse_arguments,
)
from calm.training.flags.recipe import Stage
from calm.training.latent_basis import is_whitened, whiten_latent
from calm.training.model_card import write_model_card
from calm.training.monitoring.clock import UNBOUNDED_STEPS, RunLimit
from calm.training.monitoring.progress import print_saved
from calm.training.monitoring.scoring import check_best_metric
from calm.training.objectives.tempered_spread import set_tempered_spread
from calm.training.processes import agreed
from calm.training.sharding.settings import check_processes
from calm.training.stages import STAGES
from calm.training.trainer import CALMTrainer
from calm_kernels.backend import Backend, use_backend

__all__ = ["BuildModel", "prepare_job", "run_job", "run_stage"]

logger = logging.getLogger(__name__)

BuildModel = Callable[[JobArguments, PreTrainedTokenizerBase], PreTrainedModel]
LAST = ("true", "last")  # values of the flag that ask for this run's last good checkpoint


def run_stage(stage: Stage, build_model: BuildModel, argv: list[str] | None) -> int:
    """`run_job` as a program: its exit status, see `run_program`."""
    is_first = os.environ.get("RANK", "0") == "0"  # the logs of all processes say the same
    level = logging.INFO if is_first else logging.ERROR
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=level)
    logging.getLogger("huggingface_hub").propagate = False  # it writes its warnings itself
    disable_progress_bar()  # of weights being written; training has its own

    def work() -> int:
        try:
            run_job(parse_arguments(sys.argv[1:] if argv is None else argv, stage), build_model)
        except KeyboardInterrupt:
            logger.info("the same command goes on from the last checkpoint, if it has written one")
            raise
        atexit.register(_leave_process_group)
        return 0

    return run_program(work, command=f"calm {STAGES[stage].command}", extras="train")


def _leave_process_group() -> None:
    """Stop Gloo's threads, which may otherwise abort a process that has done its work."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def run_job(arguments: JobArguments, build_model: BuildModel) -> CALMTrainer:
    """Train and evaluate as `arguments` say; the trainer that did it.

    Args:
        arguments: from `parse_arguments`.
        build_model: makes or loads the model of the stage, given its tokenizer.

    Raises:
        UserError: wrong data, models, checkpoints or settings; a loss that is not finite.
    """
    args = arguments.training
    check_output_folder(arguments)
    check_processes(args)
    with ExitStack() as stack:
        if args.backend != Backend.AUTO:
            stack.enter_context(use_backend(args.backend))
        if args.do_train and args.process_index == 0:
            stack.enter_context(locked(args.folder))
        checkpoint = None
        if args.do_train:
            checkpoint = _agreed_resume_point(args)
        trainer = prepare_job(arguments, build_model, checkpoint)
        if args.do_train:
            _train(trainer, checkpoint)
        metrics: dict[str, float] = {}
        if args.do_eval:
            metrics = _last_evaluation(trainer) or trainer.evaluate()
            _report(trainer, "eval", metrics)
        if args.do_train and args.should_save:
            write_model_card(trainer, metrics)
            print_saved(args.folder)
    return trainer


def prepare_job(
    arguments: JobArguments, build_model: BuildModel, checkpoint: Path | None = None
) -> CALMTrainer:
    """The trainer of a job, with model and blocks.

    Args:
        arguments: from `parse_arguments`.
        build_model: makes or loads the model of the stage, given its tokenizer.
        checkpoint: the whole checkpoint from which the job is to go on.

    Raises:
        UserError: as for `run_job`; settings that differ from the checkpoint's.
    """
    # Here, so that a trainer of given blocks needs no `datasets`.
    import datasets

    from calm.training.text.prepared_text import BlockLayout
    from calm.training.text.training_text import load_text, pack_text, protocol

    args = arguments.training
    if args.disable_tqdm:
        datasets.disable_progress_bars()
    if args.max_train_seconds and args.max_steps <= 0:
        args.max_steps = UNBOUNDED_STEPS
    with args.main_process_first(desc="reading the text"):
        text = load_text(arguments, checkpoint)
    set_seed(args.seed)  # initial weights must not depend on draws made while reading the text
    model = build_model(arguments, text.tokenizer)
    if arguments.model.torch_dtype not in (None, "auto"):
        model.to(dtype=weight_dtype(arguments.model.torch_dtype))  # type: ignore[call-arg] # torch's signature is hidden
    check_context(model, arguments.block_size)
    check_best_metric(args.metric_for_best_model, model)
    _check_draws(arguments, model)
    with args.main_process_first(desc="packing the text"):
        blocks = pack_text(arguments, text, BlockLayout.of(model))
    record = protocol(arguments, text, blocks, model) if args.should_save or checkpoint else {}
    trainer = CALMTrainer(
        model,
        args,
        protocol=record,
        callbacks=_limits(arguments),
        tokens_per_character=getattr(blocks.train, "tokens_per_character", None),
        train_dataset=blocks.train,
        eval_dataset=blocks.validation,
        processing_class=text.tokenizer,
    )
    if checkpoint is not None:
        takeover = Takeover.check(checkpoint, record, model, allow_changes=args.allow_changes)
        record["changes"] = takeover.record()
        if takeover.changes:
            logger.warning("from step %d on, %s", takeover.step, takeover)
    return trainer


def _limits(arguments: JobArguments) -> list[RunLimit]:
    """What ends the run before its last step, beside ``max_train_seconds``."""
    known = STAGES[arguments.stage].limits
    return known(arguments.options) if known else []


def _check_draws(arguments: JobArguments, model: PreTrainedModel) -> None:
    """The draws of a step of training and of evaluation fit into memory."""
    args = arguments.training
    chunks = arguments.block_size // getattr(model, "patch_size", 1)
    if args.do_train and hasattr(model.config, "num_samples"):
        batch = args.per_device_train_batch_size
        check_draws(model, "num_samples", model.config.num_samples, batch * chunks)
    if args.do_eval:
        check_draws(model, "eval_num_samples", args.eval_num_samples, chunks)


def _train(trainer: CALMTrainer, checkpoint: Path | None) -> None:
    args = trainer.args
    if args.overwrite_output_dir:
        with args.main_process_first(desc="deleting checkpoints"):
            discard_checkpoints(args.folder)
    if checkpoint is not None:
        with args.main_process_first(desc="setting later checkpoints aside"):
            set_aside_later(args.folder, checkpoint)
        logger.info("resuming from %s", checkpoint)
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    whiten_latent(trainer)
    set_tempered_spread(trainer)
    trainer.save_model()
    trainer.save_state()
    result.metrics.pop("total_flos", None)
    _report(trainer, "train", result.metrics)


def _last_evaluation(trainer: CALMTrainer) -> dict[str, float] | None:
    """Metrics of an evaluation after the last step, if the model still has those weights."""
    if trainer.args.load_best_model_at_end or is_whitened(trainer.model):
        return None
    for entry in reversed(trainer.state.log_history):
        if entry["step"] == trainer.state.global_step and "eval_loss" in entry:
            return {name: value for name, value in entry.items() if name != "step"}
    return None


def _report(trainer: CALMTrainer, stage: str, metrics: dict[str, float]) -> None:
    trainer.log_metrics(stage, metrics)
    trainer.save_metrics(stage, metrics)


def _agreed_resume_point(args: CALMTrainingArguments) -> Path | None:
    """Where all processes resume: the first looks, so that files are read and hashed once."""
    return agreed(args, lambda: _resume_point(args) if args.process_index == 0 else None)


def _resume_point(args: CALMTrainingArguments) -> Path | None:
    """The checkpoint to resume from, or None to start at the beginning."""
    folder, asked = args.folder, args.resume_from_checkpoint
    is_named = asked is not None and str(asked).lower() not in LAST
    if args.overwrite_output_dir:
        if asked is not None:
            raise UserError("overwrite_output_dir and resume_from_checkpoint exclude each other")
        return None
    if is_named:
        return check_usable(Path(str(asked)))
    found = last_good_checkpoint(folder)
    if found is None and asked is not None:
        raise UserError(f"resume_from_checkpoint: {folder} holds no good checkpoint")
    return found
