"""What tests of the command line share."""

import json
from pathlib import Path

from calm import cli, pretrained

EOS, PAD = 257, 258
TEXT = "the quick brown fox jumps over the lazy dog and the small cat sleeps\n"


def has_weights():
    """Whether the models that come with the package are in this checkout."""
    folder = Path(pretrained.__file__).parent
    return all((folder / name / "config.json").is_file() for name in pretrained.PRETRAINED)


def calm(*words):
    """Exit status of `calm` with these words."""
    return cli.main([str(word) for word in words])


def error_of(capsys, *words):
    """The one line that a mistake is answered with."""
    assert calm(*words) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    assert captured.out == ""
    return lines[0]


def objects(capsys):
    """The JSON objects that were printed, one a line."""
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]
