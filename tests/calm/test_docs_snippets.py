"""What pages show runs: Python as it stands, on tiny models; commands as far as their parsers."""

import argparse
import importlib
import re
import shlex
import subprocess
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from calm import cli
from calm.errors import UserError
from calm.training.flags.arguments import parse_arguments
from calm.training.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "calm_kernels").glob("*/README.md")),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
]
BLOCK = re.compile(r"^(```|~~~)(\w*)\n(.*?)^\1", re.DOTALL | re.MULTILINE)
PROGRAMS = ("calm", "make", "pip", "python", "python3", "torchrun", "curl", "export")
OF_ANOTHER_TEST = {"docs/serving.md"}  # test_cli_serve.py sends it to a server
# What the README's snippets find: draws of a head, the posterior of their targets, a prompt.
GIVEN = {
    "torch": torch,
    "samples": torch.zeros(8, 2, 3, 4),
    "mean": torch.ones(2, 3, 4),
    "log_std": torch.zeros(2, 3, 4),
    "input_ids": torch.zeros(1, 8, dtype=torch.long),
}
STAGE_OF = {description.command: stage for stage, description in STAGES.items()}
COMMAND_OF = {command.module: name for name, command in cli.TRAINING.items()}
NOT_INSTALLED = {"calm.integrations.lm_eval"}  # needs the lm-evaluation-harness


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page):
    """Language and text of each block of code."""
    return [(found[2], found[3]) for found in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def commands(page):
    """The words of every command, without what is set before it."""
    for language, text in blocks(page):
        first = text.split()[0]
        if language == "sh" or (language == "" and first in PROGRAMS):
            for line in text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words and re.match(r"[A-Z_]+=", words[0]):
                    words.pop(0)
                if words:
                    yield words


def python_of(page):
    return [text for language, text in blocks(page) if language == "python"]


WITH_PYTHON = [page for page in PAGES if python_of(page) and name_of(page) not in OF_ANOTHER_TEST]
WITH_COMMANDS = [page for page in PAGES if any(commands(page))]


@pytest.fixture
def here(folders, package, tmp_path, monkeypatch):
    """A folder that holds what the demo leaves, with tiny models."""
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "checkpoint").symlink_to(folders / "calm")
    for kind in ("calm", "baseline"):
        (tmp_path / "runs" / "demo" / kind).symlink_to(folders / kind)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_runs_from_top_to_bottom(page, here):
    names = dict(GIVEN) if page.name == "README.md" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for text in python_of(page):
            exec(compile(text, name_of(page), "exec"), names)


class Parsed(BaseException):
    """A parser has taken the words of a command."""


@pytest.fixture
def parse_only(monkeypatch):
    """Programs end where their words have been parsed."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_end(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    parse_known = cli.Parser.parse_known_args

    def parse_known_and_end(self, args=None, namespace=None):
        """`calm` itself, not the parser of a command of it, has taken all words."""
        found, unknown = parse_known(self, args, namespace)
        if self.prog == "calm" and not unknown:
            raise Parsed
        return found, unknown

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
    monkeypatch.setattr(cli.Parser, "parse_known_args", parse_known_and_end)


def run(main, words):
    """A program, as far as its parser."""
    try:
        status = main(words)
    except Parsed:
        return
    raise AssertionError(f"{shlex.join(words)}: ended with status {status}")


def take_module(name, words):
    """`python -m NAME WORDS`."""
    if name in COMMAND_OF:
        take(["calm", COMMAND_OF[name], *words])
        return
    if name in NOT_INSTALLED:
        assert find_spec(name), f"no module {name}"
        return
    run(importlib.import_module(name).main, words)


def take_launched(launcher, words):
    """What a launcher, whose parser reads its own words first, starts in every process."""
    found, unknown = launcher.parse_known_args(words)
    assert found.module and not unknown, unknown
    take_module(found.training_script, found.training_script_args)


def take(words):
    """Let the program's own parser read the words of a command."""
    match words:
        case ["calm", command, *flags] if command in STAGE_OF:
            parse_arguments(["--use_cpu=True", *flags], STAGE_OF[command])
        case ["calm", *rest]:
            run(cli.main, rest)
        case ["python" | "python3", "-m", module, *rest]:
            take_module(module, rest)
        case ["python" | "python3", path, *rest] if (ROOT / path).is_file():
            if path.startswith("benchmarks/"):
                take_module(path.removesuffix(".py").replace("/", "."), rest)
        case ["torchrun", *rest]:
            take_launched(get_args_parser(), rest)
        case ["accelerate", "launch", *rest]:
            take_launched(launch_command_parser(), rest)
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            for target in targets:
                assert f"\n{target}: " in makefile, f"no target {target}"
        case ["pip", "install", requirement]:
            known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
            extras = re.fullmatch(r"(?:\.|calm-lm)\[([\w,]+)\]", requirement)[1].split(",")
            assert set(extras) <= set(known["project"]["optional-dependencies"])
        case ["curl" | "export" | "pre-commit", *_]:
            pass
        case [program, *rest] if program.startswith(".venv/bin/"):
            take([program.removeprefix(".venv/bin/"), *rest])
        case _:
            raise AssertionError(f"nothing reads {shlex.join(words)}")


def test_the_slurm_job_starts_what_the_page_does(parse_only, monkeypatch):
    """Bash can read it, and its command is that of docs/scaling.md."""
    script = ROOT / "examples" / "slurm_64_gpus.sh"
    subprocess.run(["bash", "-n", script], check=True)
    lines = script.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    (command,) = (shlex.split(line)[1:] for line in lines if line.startswith("srun "))
    take(command)
    own = [word for word in command if "rdzv_id" not in word and "SLURM" not in word]
    page = [words for words in commands(ROOT / "docs" / "scaling.md") if "--nnodes" in words]
    assert [[word for word in words if "$" not in word] for words in page] == [
        [word for word in own if "$" not in word]
    ]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name_of)
def test_commands_are_what_their_programs_take(page, parse_only, package, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        take(words)


@pytest.mark.parametrize(
    "line",
    [
        "calm eval --modle x",
        "calm plan --gpus x",
        "make nonsense",
        "pip install '.[no]'",
        "calm train --nope 1",
    ],
)
def test_a_wrong_command_is_found(line, parse_only):
    with pytest.raises((AssertionError, UserError)):
        take(shlex.split(line))
