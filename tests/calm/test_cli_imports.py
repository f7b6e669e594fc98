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
    "words", [[], ["--help"], ["--version"]], ids=["nothing", "help", "version"]
)
def test_help_waits_for_no_library(words):
    code = f"from calm import cli\ntry:\n    cli.main({words})\nexcept SystemExit:\n    pass"
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
    ("command", "package", "extras"),
    [
        ("demo", "datasets", "train,plot"),
        ("demo", "matplotlib", "train,plot"),
        ("train", "datasets", "train"),
        ("train-ae", "datasets", "train"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(command, package, extras, capsys, monkeypatch):
    for name in list(sys.modules):
        if name.startswith(("calm.experiments", "calm.training", "calm.data", package)):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main([command, "--output_dir", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: `calm {command}` needs {package}")
    assert error.strip().endswith(f"pip install 'calm-lm[{extras}]'")


@pytest.mark.parametrize("command", ["train-ae", "train", "train-ar"])
def test_help_of_training_names_the_command(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: calm {command} [--config RECIPE]")
