"""Bars at a terminal, lines in a file, nothing where work is short."""

import io
import sys

import pytest

from calm import progress_bar as module
from calm.progress_bar import progress_bar


class Stream(io.StringIO):
    def __init__(self, is_terminal):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal


@pytest.fixture
def written(monkeypatch):
    def work(is_terminal, seconds):
        monkeypatch.setattr(module, "SECONDS", seconds)
        monkeypatch.setattr(sys, "stderr", Stream(is_terminal))
        assert list(progress_bar(range(3), desc="cells")) == [0, 1, 2]
        return sys.stderr.getvalue()

    return work


def test_a_file_gets_lines(written):
    lines = written(is_terminal=False, seconds=0).splitlines()
    assert [line.partition(" [")[0] for line in lines][-1].endswith("3/3")
    assert len(lines) >= 3 and all(line.startswith("cells: ") for line in lines)


def test_short_work_is_not_told_in_a_file(written):
    assert written(is_terminal=False, seconds=30) == ""


def test_a_terminal_gets_a_bar(written):
    text = written(is_terminal=True, seconds=30)
    assert "\rcells: 100%" in text and text.count("\n") == 1
