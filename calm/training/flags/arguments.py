"""Flags of the training programs: the published ones, those of transformers and our own.

    calm train --config calm-m --ae_name_or_path runs/ae --train_file runs/pile

``--config`` names a recipe or a YAML file whose entries are flags; flags given on the command line
override it.
"""

import argparse
import dataclasses
import logging
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from calm.data.manifest import is_prepared, read_description
from calm.data.options import CorpusOptions
from calm.errors import UserError
from calm.pretrained import packaged
from calm.ranges import FRACTION, NOT_NEGATIVE, PERCENTAGE, POSITIVE, SEED, at_least
from calm.training.compilation import check_compilation
from calm.training.flags.old_flags import translate_old_flags
from calm.training.flags.parser import TrainingParser, flag, flag_names
from calm.training.flags.recipe import Stage, recipe_names, recipe_words
from calm.training.monitoring.clock import check_schedule
from calm.training.monitoring.spikes import check_spikes
from calm.training.precision import has_bfloat16_units
from calm.training.sharding.settings import check_sharding, is_asked_to_shard
from calm.training.stages import STAGES, check_source
from calm_kernels.backend import Backend

__all__ = [
    "NO_AUTOENCODER",
    "CALMTrainingArguments",
    "DataTrainingArguments",
    "JobArguments",
    "ModelArguments",
    "parse_arguments",
]

logger = logging.getLogger(__name__)

# The numbers that flags take, ours and those of transformers; others take any finite number.
RANGES = {
    **dict.fromkeys(
        (
            "block_size", "dataloader_prefetch_factor", "ddp_timeout", "eval_accumulation_steps",
            "gradient_accumulation_steps", "max_draws", "max_eval_samples", "max_train_samples",
            "min_draws", "reward_context", "teacher_draws",
            "per_device_eval_batch_size", "per_device_train_batch_size",
            "preprocessing_num_workers", "stream_lanes",
        ),
        at_least(1),
    ),
    **dict.fromkeys(
        (
            "advantage_scale", "eval_steps", "logging_steps", "num_train_epochs",
            "reward_temperature", "save_steps",
        ),
        POSITIVE,
    ),
    **dict.fromkeys(
        (
            "adam_epsilon", "dataloader_num_workers", "eval_delay", "learning_rate",
            "max_energy_distance", "max_grad_norm", "max_train_seconds", "muon_learning_rate",
            "old_weight", "save_total_limit", "warmup_steps", "weight_decay",
        ),
        NOT_NEGATIVE,
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), FRACTION),
    **dict.fromkeys(("data_seed", "eval_seed", "seed"), SEED),
    **dict.fromkeys(("eval_num_samples", "num_draws"), at_least(2)),
    "max_steps": at_least(1, also=-1),
    "max_gradient_spike": at_least(1, also=0),
    "validation_split_percentage": PERCENTAGE,
}  # fmt: skip

NO_AUTOENCODER = (
    "a language model needs a trained autoencoder: pass ae_name_or_path (a folder that "
    "`calm train-ae` wrote), or model_name_or_path to go on with a language model"
)


@dataclass
class ModelArguments:
    """Which model to train, from what."""

    _argument_group_name = "model"

    ae_name_or_path: str | None = flag(
        None, "Trained autoencoder: folder or hub name (language model only)."
    )
    teacher_name_or_path: str | None = flag(
        None,
        "Teacher: folder or hub name of a token baseline (of an autoencoder, for alignment_weight) "
        "or of any trained language model (of a distilled one).",
    )
    model_name_or_path: str | None = flag(
        None, "Weights to start from: folder or hub name. Default: random ones."
    )
    model_type: str | None = flag(
        None, "Head of the language model: energy (default), diffusion or flow."
    )
    config_overrides: str | None = flag(
        None, "Fields of a new model, as in hidden_size=1024,num_mlp_layers=4,model_type=flow."
    )
    config_name: str | None = flag(
        None, "Folder or hub name of a configuration to start from, without its weights."
    )
    tokenizer_name: str | None = flag(
        None,
        "Folder, hub name, 'bytes' or 'bpe:<entries>' (trained on the text). Default: the one "
        "saved with the model or autoencoder.",
    )
    add_pad_token: bool = flag(
        True, "Append [PAD] to a tokenizer without pad token. False: stop there with an error."
    )
    cache_dir: str | None = flag(None, "Where downloads and prepared data are kept.")
    use_fast_tokenizer: bool = flag(True, "Use the fast form of the tokenizer.")
    model_revision: str = flag("main", "Branch, tag or commit of what comes from a hub.")
    token: str | None = flag(None, "Access token of the hub.")
    trust_remote_code: bool = flag(
        False, "Run code that comes with a hub tokenizer; only for repositories you have read."
    )
    torch_dtype: str | None = flag(
        None,
        "Type of the weights: float32 (default), bfloat16, float16, or auto (the file's). For "
        "mixed precision keep float32 and pass --bf16.",
    )

    def __post_init__(self) -> None:
        for name in ("model_name_or_path", "teacher_name_or_path"):
            if given := getattr(self, name):
                setattr(self, name, packaged(given))


@dataclass
class DataTrainingArguments:
    """Which text to train and evaluate on."""

    _argument_group_name = "text"

    dataset_name: str | None = flag(
        None,
        "Hub dataset, local dataset folder, or embedded:docstrings (or :packages, :topics).",
    )
    dataset_config_name: str | None = flag(None, "Configuration of the hub dataset.")
    train_file: str | None = flag(
        None,
        "Text to learn from: a folder of calm prepare; or text, .jsonl, .json (also .gz, .zst) or "
        ".parquet files, with commas between; globs work.",
    )
    validation_file: str | None = flag(None, "Held-out text, named the same way.")
    max_train_samples: int | None = flag(None, "Use only this many training blocks, the first.")
    max_eval_samples: int | None = flag(None, "Use only this many validation blocks, the first.")
    require_prepared: bool = flag(
        False, "Refuse text to learn from that is neither a folder of calm prepare nor a stream."
    )
    streaming: bool = flag(False, "Read and tokenize the text during training, without a cache.")
    stream_lanes: int = flag(
        1,
        "Parts into which a stream is dealt and which take turns. A multiple of processes x batch "
        "x loader workers lets each worker tokenize its own part alone.",
    )
    block_size: int | None = flag(
        None,
        "Tokens of a training sequence, a multiple of K. Default: 8192 for the language model, "
        "2048 for autoencoder and baseline.",
    )
    overwrite_cache: bool = flag(False, "Prepare the text again.")
    validation_split_percentage: float = flag(
        5, "Share of documents held out when there is no validation data; 0 for none."
    )
    preprocessing_num_workers: int | None = flag(None, "Processes that read and tokenize.")
    keep_linebreaks: bool = flag(True, "Keep the line breaks of text files.")
    text_unit: str = flag("line", "One document of a text file: line, paragraph or file.")
    on_error: str = flag(
        "stop", "What to do about text that cannot be read: stop, or skip and count it."
    )


@dataclass
class CALMTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments` and the settings of continuous language models."""

    _argument_group_name = "training"

    backend: str = flag(Backend.AUTO.value, "Implementation of the operations.")
    eval_num_samples: int = flag(8, "Draws per position that BrierLM is estimated from.")
    eval_seed: int = flag(0, "Seed of the draws of evaluation; training has its own, --seed.")
    max_train_seconds: float = flag(
        0.0,
        "Stop after this many seconds of training steps; the learning-rate schedule then follows "
        "the time instead of the steps. 0: no limit.",
    )
    muon_learning_rate: float = flag(
        0.0,
        "Update weight matrices by Muon at this rate, everything else by AdamW at learning_rate. "
        "0: AdamW for all.",
    )
    max_gradient_spike: float = flag(
        0.0,
        "A gradient norm above this many times the median of the last 100 is a spike; its batch is "
        "kept in output_dir/spikes. 0: none is looked for.",
    )
    on_spike: str = flag("stop", "What to do about a spike: stop, or skip its update.")
    torch_compile: bool = flag(
        False,
        "Train with compiled decoder layers. Of transformers' flags for compilation the only one.",
    )
    overwrite_output_dir: bool = flag(
        False, "Start afresh instead of resuming from the last good checkpoint in output_dir."
    )
    allow_changes: bool = flag(
        False, "Resume with other settings than the checkpoint's, and record both."
    )

    @property
    def folder(self) -> Path:
        """`output_dir` as a path."""
        return Path(str(self.output_dir))

    @property
    def is_sharded(self) -> bool:
        """Whether weights are split among processes."""
        return is_asked_to_shard(self)

    def __post_init__(self) -> None:
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()  # a file gets lines alone
        # A filtered average would hide the loss that stops the run.
        self.logging_nan_inf_filter = False
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every trained parameter is used in every step
        if (self.bf16 or self.bf16_full_eval) and not self.use_cpu:
            self._choose_cpu_without_gpu()
        # transformers would compile whole models, and take TF32 for every matmul.
        compiles, self.torch_compile = self.torch_compile, False
        super().__post_init__()
        self.torch_compile = compiles
        if self.device.type == "cpu":
            # Both speed up copies to a GPU only, and warn without one.
            loading: Any = self.accelerator_config
            self.dataloader_pin_memory = loading.non_blocking = False

    def _choose_cpu_without_gpu(self) -> None:
        """Run bf16 on the CPU of a machine without GPU, where transformers stops with an error."""
        if torch.accelerator.is_available():
            return
        self.use_cpu = True
        where = "on the CPU"
        if not has_bfloat16_units(torch.device("cpu")):  # emulation: at least six times as slow
            self.bf16 = self.bf16_full_eval = False
            where += ", in float32 because it has no bfloat16 units"
        logger.warning("bf16 without a GPU: running %s", where)


@dataclass(frozen=True)
class JobArguments:
    """All settings of one training job."""

    stage: Stage
    model: ModelArguments
    data: DataTrainingArguments
    training: CALMTrainingArguments
    options: Any = None  # the flags that its stage alone has, see `STAGES`

    @property
    def block_size(self) -> int:
        """Tokens of a block, the stage's default where no flag says otherwise."""
        return self.data.block_size or STAGES[self.stage].block_size

    @property
    def batch_tokens(self) -> int:
        """Tokens of a micro-batch of a device, in training or evaluation, whichever has more."""
        training = self.training
        sizes = training.per_device_train_batch_size, training.per_device_eval_batch_size
        return max(sizes) * self.block_size

    @property
    def corpus(self) -> CorpusOptions:
        """What `calm.data.load_corpus` needs to know."""
        names = {option.name for option in dataclasses.fields(CorpusOptions)}
        flags = {**dataclasses.asdict(self.data), "cache_dir": self.model.cache_dir}
        chosen = {name: value for name, value in flags.items() if name in names}
        return CorpusOptions(**chosen, token=self.model.token)


def parse_arguments(argv: list[str], stage: Stage) -> JobArguments:
    """Flags of `stage` from the command line `argv` and the recipe that it names.

    Raises:
        UserError: unknown flags or recipe entries (with close names), values of the wrong type,
            combinations that do not work.
    """
    groups: list[Any] = [ModelArguments, DataTrainingArguments, CALMTrainingArguments]
    description = STAGES[stage]
    if description.options:
        groups.append(description.options)
    parser = TrainingParser(
        groups,
        RANGES,
        prog=f"calm {description.command}",
        description=f"Train the {description.trained}. Flags given here override those of "
        f"--config. Recipes: {', '.join(recipe_names())}.",
    )
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config")
    chosen, argv = before.parse_known_args(argv)
    given = flag_names(argv)
    recipe = [] if chosen.config is None else recipe_words(chosen.config, stage, given)
    parser.parse(translate_old_flags(recipe, quiet=True), f"{chosen.config}: ")
    words = translate_old_flags([*recipe, *argv])
    namespace = parser.parse(words)
    if not namespace.dataloader_num_workers and "dataloader_prefetch_factor" not in given:
        namespace.dataloader_prefetch_factor = None  # the recipe's, of workers that are not there
    if is_prepared(namespace.train_file) and "validation_split_percentage" not in given:
        prepared = read_description(Path(namespace.train_file))  # it says what is held out
        namespace.validation_split_percentage = prepared.validation_split_percentage
    if not any(word.startswith(("--do_", "--do-")) for word in words):
        namespace.do_train = True  # evaluation alone has to be asked for
    if namespace.deepspeed and find_spec("deepspeed") is None:
        raise UserError("deepspeed is not installed: pip install deepspeed, or take the flag out")
    arguments = JobArguments(stage, *(_construct(group, namespace) for group in groups))
    _check(arguments)
    return arguments


def _construct(group: Any, namespace: argparse.Namespace) -> Any:
    names = [option.name for option in dataclasses.fields(group) if option.init]
    try:
        return group(**{name: getattr(namespace, name) for name in names})
    except Exception as error:  # transformers raises whatever a wrong flag happens to cause
        raise UserError(str(error) or type(error).__name__) from error


def _check(arguments: JobArguments) -> None:
    """Refuse combinations that transformers would run as something else, or not at all."""
    training, data, model = arguments.training, arguments.data, arguments.model
    check_sharding(training)
    if training.n_gpu > 1:
        raise UserError(
            f"{training.n_gpu} GPUs in one process would share their random draws; launch with "
            f"torchrun --nproc_per_node {training.n_gpu}, or choose one with CUDA_VISIBLE_DEVICES"
        )
    if arguments.options:
        check_source(model)
    elif arguments.stage is not Stage.CALM and model.ae_name_or_path:
        raise UserError(
            f"ae_name_or_path belongs to the language model, not to the {arguments.stage}"
        )
    if model.teacher_name_or_path and not STAGES[arguments.stage].has_teacher:
        taught = [f"calm {stage.command}" for stage in STAGES.values() if stage.has_teacher]
        raise UserError(
            f"teacher_name_or_path belongs to {' and '.join(taught)}, not to the {arguments.stage}"
        )
    if training.do_eval and not (training.do_train or model.model_name_or_path):
        raise UserError(
            "do_eval without do_train would measure random weights: pass model_name_or_path, the "
            "folder of a model"
        )
    if training.eval_on_start and not training.do_eval:
        raise UserError("eval_on_start needs text to evaluate on: pass --do_train --do_eval too")
    if data.text_unit not in ("line", "paragraph", "file"):
        raise UserError(f"text_unit must be line, paragraph or file, got {data.text_unit!r}")
    if training.backend not in list(Backend):
        raise UserError(f"backend must be one of {', '.join(Backend)}, got {training.backend!r}")
    check_compilation(training)
    check_spikes(training)
    check_schedule(training)
    if training.label_smoothing_factor:
        raise UserError("label_smoothing_factor has no effect on these losses: take it out")
    loading: Any = training.accelerator_config
    if loading.split_batches:
        raise UserError("accelerator_config: split_batches would give draws to other sequences")
    trackers = get_available_reporting_integrations()
    if unknown := sorted(set(training.report_to or ()) - set(trackers)):
        raise UserError(
            f"report_to: no tracker {unknown[0]!r} is installed here (installed: "
            f"{', '.join(trackers) or 'none'}); pip install it (tensorboard comes with "
            "'calm-lm[train]'), or take the flag out"
        )
    is_stream = data.streaming and not is_prepared(data.train_file)
    if is_stream and training.max_steps <= 0 and not training.max_train_seconds:
        raise UserError("a stream has no length: pass max_steps (or max_train_seconds)")
