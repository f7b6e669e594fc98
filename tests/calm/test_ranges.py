"""Ranges of numbers, and what is said about a number outside."""

import argparse
import math

import pytest
import torch

from calm.errors import UserError
from calm.memory import check_memory
from calm.ranges import ANY, FRACTION, NOT_NEGATIVE, POSITIVE, at_least, name_first, number


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "text"),
    [
        (ANY, (-1e300, 0, 10**400), (), "a finite number"),
        (POSITIVE, (1e-300, 3), (0, -1), "above 0"),
        (NOT_NEGATIVE, (0, 3), (-1e-300,), "at least 0"),
        (FRACTION, (0, 0.999), (1, -0.1), "in [0, 1)"),
        (at_least(1, also=-1), (1, -1), (0, -2), "at least 1, or -1"),
    ],
)
def test_ranges(allowed, inside, outside, text):
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in (*outside, math.nan, math.inf, -math.inf))
    assert str(allowed) == text


def test_a_flag_says_what_it_takes():
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--draws", type=number(int, at_least(2)))
    assert parser.parse_args(["--draws=2"]).draws == 2
    for word, message in (
        ("1", "argument --draws: must be at least 2, got 1"),
        ("two", "argument --draws: invalid int value: 'two'"),
    ):
        with pytest.raises(argparse.ArgumentError) as caught:
            parser.parse_args([f"--draws={word}"])
        assert str(caught.value) == message
    assert name_first("argument --max_x/--max-x: must be 1") == "--max_x must be 1"
    assert name_first("argument --x: invalid") == "argument --x: invalid"


def test_what_cannot_fit_is_refused():
    check_memory("a page", 4096, torch.device("cpu"))
    with pytest.raises(
        UserError, match=r"^num_samples=9 takes at least 1,073,741,824\.0 GiB.* cpu"
    ):
        check_memory("num_samples=9", 2**60, torch.device("cpu"))
