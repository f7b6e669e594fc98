"""The command-line parser of the training programs: short help, and errors as `UserError`."""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from calm.errors import UserError
from calm.ranges import ANY, Range, name_first, number
from calm.training.flags.config_overrides import close_names

__all__ = ["TrainingParser", "flag", "flag_names"]

# The flags of transformers that the help shows; it has about two hundred.
SHOWN = """
output_dir do_train do_eval num_train_epochs max_steps per_device_train_batch_size
per_device_eval_batch_size gradient_accumulation_steps learning_rate lr_scheduler_type warmup_steps
weight_decay adam_beta1 adam_beta2 max_grad_norm bf16 torch_compile seed use_cpu logging_steps
eval_strategy eval_steps save_strategy save_steps save_total_limit metric_for_best_model
load_best_model_at_end resume_from_checkpoint report_to
"""
THEIRS = {field.name for field in dataclasses.fields(TrainingArguments)}
METAVARS = {"int": "N", "float": "X"}


def flag(default: Any, text: str) -> Any:
    """The field of a dataclass that is a flag, with its default and its help."""
    return dataclasses.field(default=default, metadata={"help": text})


def flag_names(argv: list[str]) -> set[str]:
    """Names of the flags in `argv`, with underscores."""
    flags = [word for word in argv if word.startswith("--")]
    return {flag[2:].partition("=")[0].replace("-", "_") for flag in flags}


class _Help(argparse.HelpFormatter):
    """Shows one spelling of each flag, and defaults that are more than empty or False."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = action.option_strings[-1 if action.nargs == 0 and action.dest == "help" else 0]
        if action.nargs in (0, "?"):  # switches
            return name
        kind = getattr(action.type, "__name__", "")
        return f"{name} {METAVARS.get(kind, 'VALUE')}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.dest in THEIRS:  # their first sentence
            text = text.partition(". ")[0].rstrip(".")
        says_nothing = action.default in (None, False, argparse.SUPPRESS, "", [])
        default = getattr(action.default, "value", action.default)
        return text if says_nothing else f"{text} (default: {str(default).replace('%', '%%')})"


class TrainingParser(HfArgumentParser):
    """Flags from dataclasses. Abbreviated and unknown flags are errors.

    Args:
        groups: dataclasses whose fields are flags.
        ranges: of the numbers that flags take, by name; others take any finite number.
        options: of `argparse.ArgumentParser`.
    """

    def __init__(self, groups: Any, ranges: Mapping[str, Range], **options: Any) -> None:
        super().__init__(
            groups,
            usage="%(prog)s [--config RECIPE] [--flag value ...]",
            epilog="Every other flag of transformers' TrainingArguments works too.",
            formatter_class=_Help,
            allow_abbrev=False,
            **options,
        )
        self.add_argument("--config", help="recipe or YAML file of flags")
        for action in self._actions:
            if action.type in (int, float):
                action.type = number(action.type, ranges.get(action.dest, ANY))
            is_opposite = any(option.startswith("--no_") for option in action.option_strings)
            if is_opposite or (action.dest in THEIRS and action.dest not in SHOWN.split()):
                action.help = argparse.SUPPRESS

    def error(self, message: str) -> NoReturn:
        """Raise the error that argparse would print."""
        raise UserError(name_first(message))

    def parse(self, words: list[str], source: str = "") -> argparse.Namespace:
        """Values of the flags in `words`; error messages begin with `source`."""
        try:
            namespace, unknown = self.parse_known_args(words)
        except UserError as error:
            raise UserError(f"{source}{error}") from None
        if unknown:
            known = [option for option in self._option_string_actions if "-" not in option[2:]]
            named = [word for word in unknown if word.startswith("-")] or unknown  # without values
            hints = [word + close_names(word.partition("=")[0], known) for word in named]
            raise UserError(f"{source}unknown flag {', '.join(hints)}")
        return namespace
