"""What a run prints: logs as lines, and the time that is left."""

import pytest
from training_cases import MODELS, make_trainer
from transformers import TrainerState

from calm.training.flags.arguments import CALMTrainingArguments
from calm.training.monitoring import progress
from calm.training.monitoring.clock import TrainingClock
from calm.training.monitoring.progress import LogLines, ProgressBar, log_line
from calm.units import duration


def state_at(step, steps=40):
    return TrainerState(global_step=step, max_steps=steps)


def test_a_log_as_a_line():
    logs = {
        "loss": 3.21412, "skipped_steps": 2, "tokens_per_second": 12345.6, "mfu": 0.4123,
        "peak_memory_bytes": 37.125 * 2**30, "data_share": 0.004, "forward_share": 0.996,
    }  # fmt: skip
    assert log_line(logs, state_at(7), 4320.0) == (
        "step 7 of 40 · loss 3.214 · skipped_steps 2 · 12,346 tokens/s · MFU 41.2 % · 37.12 GiB · "
        "data 0.4 %, forward 99.6 % · 72.0 minutes left"
    )
    evaluated = {"eval_loss": 1.0, "eval_floor_share": 0.25}  # no share of a step's time
    said = log_line(evaluated, state_at(40), 0.0)
    assert said == "step 40 of 40 · eval_loss 1 · eval_floor_share 0.25"
    assert log_line({}, state_at(9, 10**9), None) == "step 9"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.31, "0.3 seconds"), (119, "119.0 seconds"), (7199, "120.0 minutes"),
     (7200, "2.0 hours"), (1e6, "11.6 days")],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


class TestTimeLeft:
    def printed(self, callback, monkeypatch, capsys, *, first, step):
        """The line of a log 30 seconds after a start at step `first`."""
        now = iter([100.0, 130.0])
        monkeypatch.setattr(progress.time, "perf_counter", lambda: next(now))
        callback.on_train_begin(None, state_at(first), None)
        callback.on_log(None, state_at(step), None, logs={"loss": 1.0})
        return capsys.readouterr().out

    def test_it_counts_the_steps_since_the_start_alone(self, monkeypatch, capsys):
        said = self.printed(LogLines(), monkeypatch, capsys, first=30, step=36)
        assert said == "step 36 of 40 · loss 1 · 20.0 seconds left\n"

    def test_a_run_by_time_has_its_budget(self, monkeypatch, capsys):
        clock = TrainingClock(budget=500.0, elapsed=320.0)
        said = self.printed(LogLines(clock), monkeypatch, capsys, first=0, step=2)
        assert said.endswith("3.0 minutes left\n")

    def test_an_evaluation_alone_has_none(self, capsys):
        LogLines().on_log(None, state_at(0, 0), None, logs={"eval_loss": 2.0})
        assert capsys.readouterr().out == "step 0 · eval_loss 2\n"


def test_tensorboard_gets_what_is_logged(tmp_path):
    """In the output folder, under names with the part of the text before them."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = {"report_to": "tensorboard", "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(MODELS["energy"](), tmp_path, **settings)
    trainer.train()
    (written,) = (tmp_path / "runs").glob("*/events.out.*")
    found = events.EventAccumulator(str(written)).Reload()
    for tag, name in (("train/fidelity", "fidelity"), ("eval/brier_lm", "eval_brier_lm")):
        logged = {e["step"]: e[name] for e in trainer.state.log_history if name in e}
        seen = {event.step: event.value for event in found.Scalars(tag)}
        assert logged and seen == pytest.approx(logged)


@pytest.mark.parametrize("is_terminal", [True, False], ids=["terminal", "file"])
def test_bars_are_for_terminals(is_terminal, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    settings = CALMTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert settings.disable_tqdm is not is_terminal


class TestTrainer:
    def test_without_a_bar_it_prints_lines(self, tmp_path, capsys):
        make_trainer(MODELS["baseline"](), tmp_path).train()
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(" · ")[0] for line in lines] == [f"step {n} of 2" for n in (1, 2, 2)]
        assert "tokens/s" in lines[0] and lines[0].endswith("left") and "left" not in lines[1]

    def test_a_bar_goes_on_where_the_run_does(self, tmp_path, capsys):
        saving = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "disable_tqdm": False}
        trainer = make_trainer(MODELS["baseline"](), tmp_path, **saving)
        (bar,) = [each for each in trainer.callback_handler.callbacks
                  if isinstance(each, ProgressBar)]  # fmt: skip
        trainer.train()
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        seen = capsys.readouterr()
        assert bar.training_bar is None and "step 3 of 3 · loss" in seen.out
        assert " 2/3 [" in seen.err and " 3/3 [" in seen.err

    def test_a_bar_by_time_ends_where_the_time_is_over(self, tmp_path):
        settings = {"max_train_seconds": 100.0, "max_steps": 10**9, "disable_tqdm": False}
        trainer = make_trainer(MODELS["baseline"](), tmp_path, **settings)
        (bar,) = [each for each in trainer.callback_handler.callbacks
                  if isinstance(each, ProgressBar)]  # fmt: skip
        trainer.state.max_steps = 10**9
        bar.on_train_begin(trainer.args, trainer.state, trainer.control)
        trainer.clock.elapsed, trainer.state.global_step = 25.0, 8
        bar.on_step_end(trainer.args, trainer.state, trainer.control)
        assert bar.training_bar.total == 32
        bar.on_train_end(trainer.args, trainer.state, trainer.control)
