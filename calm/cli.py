"""The `calm` command.

A subcommand's module is imported when it is chosen, so that help is quick.
"""

import argparse
import difflib
import importlib
import io
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple, NoReturn, TextIO

from calm.commands.flag_names import with_flag_names
from calm.errors import UserError, UserNotice, message_of, run_program, show_tracebacks
from calm.ranges import name_first

__all__ = ["main"]

DESCRIPTION = """\
Continuous autoregressive language models: train, evaluate, sample.

Start with `calm demo`: it trains a small model on this machine in minutes.
"""
EPILOG = """\
calm COMMAND --help says more about a command.
"""


class Command(NamedTuple):
    """A subcommand: its module, its help in one line, the extras of the package that it needs."""

    module: str
    help: str
    extras: str = "train"


COMMANDS = {
    "env": Command("calm.commands.env", "versions, devices and the chosen implementations", ""),
    "demo": Command(
        "calm.commands.demo", "train, evaluate and sample a small CALM in minutes", "train,plot"
    ),
    "prepare": Command("calm.commands.prepare", "make a tokenizer, and tokenize a corpus"),
    "plan": Command("calm.commands.plan", "size and cost of a recipe or a checkpoint"),
    "eval": Command("calm.commands.evaluate", "BrierLM of a model on a text"),
    "compare": Command("calm.commands.compare", "rank several models on one text", "train,plot"),
    "plot": Command("calm.commands.plot", "draw what training runs have logged", "train,plot"),
    "generate": Command("calm.commands.generate", "continue a prompt", ""),
    "pretrained": Command("calm.commands.pretrained", "models that come with the package", ""),
    "bench": Command("calm.commands.bench", "speed on this CPU, of texts and of operations", ""),
    "serve": Command("calm.commands.serve", "serve models behind OpenAI's interface", "serve"),
    "export": Command("calm.commands.export", "a trained model small, with scores in its card"),
    "merge": Command("calm.commands.merge", "a model's folder from a checkpoint in shards"),
    "verify": Command("calm.commands.verify", "whether a run's files are as they were written"),
    "experiment": Command("calm.commands.experiment", "study a trained model", "train,plot"),
}
# These parse their own flags, because the same programs run under torchrun.
TRAINING = {
    "train-ae": Command("calm.training.train_autoencoder", "train an autoencoder"),
    "train": Command("calm.training.train_calm", "train a CALM on an autoencoder"),
    "train-ar": Command("calm.training.train_ar", "train the token-by-token baseline"),
    "distill-temperature": Command(
        "calm.training.distill_temperature", "teach a CALM low temperatures in one draw"
    ),
    "post-train": Command("calm.training.post_train", "train a CALM by rewards of its draws"),
    "distill": Command("calm.training.distill", "teach a CALM what another model draws"),
}


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{name_first(message)} (see `{self.prog} --help`)")


class CommandList(argparse.RawDescriptionHelpFormatter):
    """Help whose columns have room for the longest command, which argparse does not count."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self._action_max_length = 6 + max(map(len, (*COMMANDS, *TRAINING)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run `calm` with the arguments `argv`, by default those of the command line.

    ``calm --traceback COMMAND ...`` shows where an error comes from.

    Returns: the exit status: 0 on success, 2 after an error that the user can mend, which is
        printed as one line, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    wants_traceback = arguments[:1] == ["--traceback"]
    arguments = arguments[wants_traceback:]
    if isinstance(sys.stdout, io.TextIOWrapper):  # a Latin-1 terminal shows ? for other characters
        sys.stdout.reconfigure(errors="replace")
    name = arguments[0] if arguments else ""
    command = {**COMMANDS, **TRAINING}.get(name)
    extras = command.extras if command else ""
    shown = show_tracebacks.set(wants_traceback)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return run_program(lambda: _run(arguments), command=f"calm {name}", extras=extras)
    finally:
        show_tracebacks.reset(shown)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A `UserNotice` as one line; other warnings as Python shows them."""
    text = f"warning: {message}\n"
    if not issubclass(category, UserNotice):
        text = warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(text)


def _run(arguments: list[str]) -> int:
    chosen = arguments[0] if arguments else None
    if chosen in TRAINING:
        train: Callable[[list[str]], Any] = importlib.import_module(TRAINING[chosen].module).main
        return train(arguments[1:]) or 0
    if chosen and not chosen.startswith("-") and chosen not in COMMANDS:
        raise UserError(f"no command {chosen!r}{_closest(chosen)} (see `calm --help`)")
    parser = _parser(chosen)
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        program = f"calm {chosen}" if args.command else "calm"
        raise UserError(f"unrecognized arguments: {' '.join(unknown)} (see `{program} --help`)")
    if args.command is None:
        parser.print_help()
        return 0
    work: Callable[[argparse.Namespace], int]
    work = importlib.import_module(COMMANDS[args.command].module).run
    try:
        if not getattr(args, "backend", None):
            return work(args)
        from calm_kernels.backend import use_backend  # imports torch, which help does not need

        with use_backend(args.backend):
            return work(args)
    except ValueError as error:
        raise UserError(with_flag_names(message_of(error), args)) from error


def _closest(name: str) -> str:
    """The end of an error message: the command that was meant, if one is like `name`."""
    found = difflib.get_close_matches(name, [*COMMANDS, *TRAINING], n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _parser(chosen: str | None) -> Parser:
    """The parser, with the flags of the chosen command alone."""
    parser = Parser(
        prog="calm",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=CommandList,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"calm {_version()}")
    parser.add_argument(
        "--traceback",
        action="store_true",
        help="as the first argument: show where an error comes from",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, command in {**COMMANDS, **TRAINING}.items():
        child = commands.add_parser(
            name,
            help=command.help,
            description=command.help[0].upper() + command.help[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name == chosen:
            module = importlib.import_module(command.module)
            module.add_arguments(child)
            examples = getattr(module, "EXAMPLES", None)
            child.epilog = f"examples:\n{examples}" if examples else None
    return parser


def _version() -> str:
    try:
        return version("calm-lm")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
