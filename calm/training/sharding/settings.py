"""Whether a job's weights are sharded, by its flags or by `accelerate launch`, and with what."""

import logging
import os
from typing import Any

from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from calm.errors import UserError

__all__ = ["check_processes", "check_sharding", "is_asked_to_shard"]

logger = logging.getLogger(__name__)

# Entries of fsdp_config; of those without effect the values that transformers gives them, or that
# say what is done anyway.
USED = ("version", "reshard_after_forward", "state_dict_type")
UNUSED = {
    "min_num_params": (0,), "xla": (False,), "xla_fsdp_v2": (False,),
    "xla_fsdp_grad_ckpt": (False,), "cpu_ram_efficient_loading": (False, "false"),
    "auto_wrap_policy": ("TRANSFORMER_BASED_WRAP",),
    "transformer_layer_cls_to_wrap": (["LlamaDecoderLayer"],),
}  # fmt: skip
SHARDED = "SHARDED_STATE_DICT"


def is_asked_to_shard(training: TrainingArguments) -> bool:
    """Whether ``--fsdp`` or the environment that `accelerate launch` makes asks for shards."""
    return bool(training.fsdp) or _variable("ACCELERATE_USE_FSDP") == "true"


def check_sharding(training: Any) -> None:
    """Refuse what sharded weights cannot be combined with, and settings that would do nothing.

    Args:
        training: `calm.training.flags.arguments.CALMTrainingArguments`.

    Raises:
        UserError: naming the flag.
    """
    if not is_asked_to_shard(training):
        return
    for flag, reason in {
        "muon_learning_rate": "needs whole matrices, and fsdp splits them",
        "fp16": "scales losses, which is not tested with fsdp: pass bf16",
        "bf16_full_eval": "would round the weights that training goes on with",
        "fp16_full_eval": "would round the weights that training goes on with",
        "deepspeed": "shards weights, too: take one of them",
        "save_only_model": "would leave shards that no run can go on from: take it out, and make "
        "them whole with `calm merge`",
    }.items():
        if value := getattr(training, flag):
            raise UserError(f"{flag}={value} {reason}; got fsdp as well")
    if not training.do_train:
        raise UserError("fsdp shards the weights of a training: take it out to evaluate alone")
    _check_settings(training.fsdp_config if training.fsdp else _launched())
    if _variable("FSDP_CPU_RAM_EFFICIENT_LOADING") == "true":
        # transformers would leave the weights of all processes but the first empty.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        logger.info("fsdp_cpu_ram_efficient_loading is off: every process reads the model itself")


def check_processes(training: TrainingArguments) -> None:
    """Raise `UserError` if weights are to be split and a launcher has not started the processes."""
    is_alone = training.parallel_mode is not ParallelMode.DISTRIBUTED
    if is_asked_to_shard(training) and is_alone:
        raise UserError(
            "fsdp splits weights among processes, and this one is alone: start them with torchrun "
            "--nproc_per_node N -m ..., or accelerate launch --num_processes N -m ..."
        )


def _check_settings(settings: dict[str, Any]) -> None:
    version = int(settings.get("version", 2))
    if version != 2:
        raise UserError(f"fsdp version must be 2 (--fsdp_version 2), got {version}")
    for name in ("cpu_offload", "activation_checkpointing"):
        if str(settings.get(name, False)).lower() == "true":
            advice = ": pass --gradient_checkpointing" if name.startswith("act") else ""
            raise UserError(f"fsdp_config: {name} is not supported{advice}")
    kind = settings.get("state_dict_type", SHARDED)
    if kind != SHARDED:
        raise UserError(
            f"fsdp_config: state_dict_type must be {SHARDED}, got {kind!r}: checkpoints hold "
            "shards, and the end of a run, or `calm merge`, makes them whole"
        )
    for name in settings.keys() - {*USED, "cpu_offload", "activation_checkpointing"}:
        if settings[name] not in UNUSED.get(name, ()):
            raise UserError(
                f"fsdp_config: {name} has no effect, calm decides what is gathered together "
                f"(calm/training/sharding/weights.py): take it out, got {settings[name]!r}"
            )


def _launched() -> dict[str, Any]:
    """Settings of `accelerate launch` that are not its defaults for what calm decides."""
    names = ("version", "offload_params", "activation_checkpointing")
    values = {name: _variable(f"FSDP_{name}".upper()) for name in names}
    found = {name: value for name, value in values.items() if value is not None}
    if "offload_params" in found:
        found["cpu_offload"] = found.pop("offload_params")
    return {"version": "1", **found}


def _variable(name: str) -> str | None:
    value = os.environ.get(name)
    return None if value is None else value.lower()
