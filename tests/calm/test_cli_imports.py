"""What the command line and the package import, when, and what they say where something lacks."""

import subprocess
import sys

import pytest

import calm
from calm import cli

NEVER = ("torch", "transformers", "datasets", "numpy", "calm_kernels")


def modules_after(code):
    """Top-level modules that a fresh Python has loaded after `code`."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nsys.stderr.write(' '.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.partition(".")[0] for name in done.stderr.split()}


@pytest.mark.parametrize(
    "words",
    [[], ["--help"], ["--version"], ["demo", "--help"]],
    ids=["nothing", "help", "version", "demo"],
)
def test_help_waits_for_no_library(words):
    code = f"from calm import cli\ntry:\n    cli.main({words})\nexcept SystemExit:\n    pass"
    assert not modules_after(code) & set(NEVER)


def test_the_help_of_a_command_waits_for_no_library():
    help_of_all = (
        "from calm import cli\nfor name in cli.COMMANDS:\n    cli._parser(name).format_help()"
    )
    assert not modules_after(help_of_all) & set(NEVER)


def test_a_wrong_path_is_told_before_anything_is_imported():
    words = ["generate", "--model", "nowhere", "--prompt", "a"]
    code = f"from calm import cli\nassert cli.main({words}) == 2"
    assert not modules_after(code) & set(NEVER)


def test_public_names_are_imported_when_they_are_used():
    assert not modules_after("import calm") & set(NEVER)
    assert set(calm.__all__) <= set(dir(calm))
    for name in calm.__all__:
        assert getattr(calm, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'calm' has no attribute 'Autoencode'"):
        _ = calm.Autoencode


@pytest.mark.parametrize("name", ["CALMConfig", "EnergyTransformer"])
def test_any_public_name_registers_the_models(name):
    modules_after(
        f"from calm import {name}\n"
        "from transformers import AutoConfig\n"
        "assert type(AutoConfig.for_model('calm')).__name__ == 'CALMConfig'\n"
        "assert type(AutoConfig.for_model('calm_autoencoder')).__name__ == 'AutoencoderConfig'\n"
    )


@pytest.mark.parametrize(
    ("command", "flag", "package", "extras"),
    [
        ("demo", "--output-dir", "datasets", "train,plot"),
        ("train", "--output_dir", "datasets", "train"),
        ("serve", "--model", "fastapi", "serve"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(command, flag, package, extras):
    """In a Python of its own, as imports that fail halfway leave modules behind."""
    code = (
        "import sys\n"
        f"sys.modules['{package}'] = None\n"
        "from calm import cli\n"
        f"sys.exit(cli.main(['{command}', '{flag}', 'nowhere']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: `calm {command}` needs {package}, which is not installed: "
        f"pip install 'calm-lm[{extras}]'\n"
    )


@pytest.mark.parametrize("command", ["train-ae", "train", "train-ar"])
def test_help_of_training_names_the_command(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: calm {command} [--config RECIPE]")
