"""An error of one process is an error of all, so that none waits for ever."""

import pytest
from forked import run_in_two
from transformers import TrainingArguments

from calm.errors import UserError
from calm.training.processes import agreed


def found(folder):
    """In each of two processes: what they agree on, and the errors that they raise."""
    args = TrainingArguments(folder, use_cpu=True, report_to="none")
    assert args.world_size == 2
    assert agreed(args, lambda: args.process_index + 5) == 5
    for failing in (0, 1):

        def work(failing=failing):
            if args.process_index == failing:
                raise UserError(f"process {failing} has no room")

        with pytest.raises(UserError, match=f"process {failing} has no room"):
            agreed(args, work)
    return 0


def test_two_processes_agree_or_fail_together(tmp_path):
    run_in_two(tmp_path, found, tmp_path)


def test_one_process_raises_its_own(tmp_path):
    args = TrainingArguments(tmp_path, use_cpu=True, report_to="none")
    assert agreed(args, lambda: 7) == 7
    own = UserError("no room")

    def work():
        raise own

    with pytest.raises(UserError) as caught:
        agreed(args, work)
    assert caught.value is own
