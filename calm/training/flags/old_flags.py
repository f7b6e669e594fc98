"""Old flags, which the published scripts pass, as transformers 5 names them."""

import logging
import os
from collections.abc import Iterator

__all__ = ["translate_old_flags"]

logger = logging.getLogger(__name__)

# Name before transformers 5 -> name now.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "tokenizer": "tokenizer_name",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
}
# What these ask for always happens now, or no longer exists.
WITHOUT_EFFECT = {
    "save_safetensors": "weights are always saved as safetensors",
    "low_cpu_mem_usage": "weights are always loaded that way",
    "use_mps_device": "the device is found by itself",
    "past_index": "it does not apply to these models",
    "include_tokens_per_second": "tokens/s are always logged",
}


def translate_old_flags(argv: list[str], *, quiet: bool = False) -> list[str]:
    """`argv` with the flags of transformers 5. One warning lists the old flags, unless `quiet`."""
    translated: list[str] = []
    notes: list[str] = []
    for name, values in _grouped(argv):
        flags, note = _translate(name, values)
        translated += flags
        if note:
            notes.append(f"--{name} ({note})")
    if notes and not quiet:
        logger.warning("old flags: %s", ", ".join(notes))
    return translated


def _grouped(argv: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Name of each flag, with underscores, and its values; the name before the first flag is ""."""
    name = ""
    values: list[str] = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            if name or values:
                yield name, values
            name, _, value = word[2:].partition("=")
            name, values = name.replace("-", "_"), [value] if "=" in word else []
        else:
            values.append(word)
    if name or values:
        yield name, values


def _translate(name: str, values: list[str]) -> tuple[list[str], str]:
    """Flags that replace one flag, and a note for the user ("" if it is current)."""
    if name in RENAMED:
        return [f"--{RENAMED[name]}", *values], f"now --{RENAMED[name]}"
    if name in WITHOUT_EFFECT:
        return [], f"no effect: {WITHOUT_EFFECT[name]}"
    if name == "warmup_ratio":
        # A ratio of 0 is the old default, which left the choice to warmup_steps.
        is_set = any(_is_nonzero(value) for value in values)
        return (["--warmup_steps", *values] if is_set else []), "now --warmup_steps below 1"
    if name == "group_by_length":
        is_set = not values or values[0].lower() in ("true", "1", "yes")
        flags = ["--train_sampling_strategy", "group_by_length"] if is_set else []
        return flags, "now --train_sampling_strategy group_by_length"
    if name == "logging_dir" and values:
        os.environ["TENSORBOARD_LOGGING_DIR"] = values[0]
        return [], "set as TENSORBOARD_LOGGING_DIR"
    return ([f"--{name}"] if name else []) + values, ""


def _is_nonzero(value: str) -> bool:
    try:
        return float(value) != 0
    except ValueError:
        return True  # the parser will say what is wrong with it
