"""`calm plot`: logs of runs, over what, and what it refuses."""

import json
from pathlib import Path

import pytest
from cli_cases import calm, error_of
from matplotlib.figure import Figure

from calm.experiments.run_logs import read_run
from calm.experiments.run_plot import NORMAL_95, panels_of
from calm.flops import flops_of
from calm.models import EnergyTransformer

PROTOCOL = {
    "stage": "calm", "block_size": 8,
    "training": {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "world_size": 2,
    },
}  # fmt: skip
# 96 tokens a step: 10 s until step 20, 20 s from there to step 40.
LOGS = [
    {"loss": 3.0, "fidelity": 5.0, "tokens_per_second": 192.0, "step": 20},
    {"eval_loss": 2.8, "eval_brier_lm": 4.0, "eval_brier_lm_se": 0.5, "step": 30},
    {"loss": 2.0, "fidelity": 4.5, "tokens_per_second": 96.0, "step": 40},
    {"eval_loss": 1.9, "eval_brier_lm": 6.0, "eval_brier_lm_se": 0.25, "step": 40},
    {"train_loss": 2.5, "epoch": 1.0, "step": 40},
]


def write_run(folder, logs=LOGS, protocol=PROTOCOL):
    folder.mkdir(parents=True)
    state = {"global_step": max((entry["step"] for entry in logs), default=0), "log_history": logs}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / "protocol.json").write_text(json.dumps(protocol))
    return folder


class TestSeries:
    @pytest.mark.parametrize(
        ("axis", "places"),
        [("steps", [30, 40]), ("tokens", [30 * 96, 40 * 96]), ("seconds", [20, 30])],
    )
    def test_places_on_an_axis(self, axis, places, tmp_path):
        run = read_run(write_run(tmp_path / "run"))
        found = run.series("eval_brier_lm", axis)
        assert found == (pytest.approx(places), [4.0, 6.0], [0.5, 0.25])
        assert run.series("loss", axis).errors is None

    def test_operations_are_those_of_the_model_that_was_trained(self, trained_calm):
        folder = trained_calm / "calm"
        run, model = read_run(folder), EnergyTransformer.from_pretrained(folder)
        tokens = 2 * 32  # of a step; blocks of 8 chunks
        each = tokens * flops_of(model, 8).training()
        assert run.series("loss", "flops").x == pytest.approx([each, 2 * each])

    def test_a_run_that_goes_on_is_read_from_its_last_checkpoint(self, tmp_path):
        write_run(tmp_path / "run", LOGS[:1])
        write_run(tmp_path / "run" / "checkpoint-40")
        write_run(tmp_path / "run" / "checkpoint-30", LOGS[:2])
        assert read_run(tmp_path / "run").series("loss", "steps").x == [20, 40]


def test_runs_are_drawn_side_by_side(tmp_path, monkeypatch, capsys):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, path: figures.append(f) or save(f, path))
    other = [{**entry, "kl": 1.0} for entry in LOGS if "loss" in entry]  # it has no score
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", other)]
    output = tmp_path / "runs.png"
    assert calm("plot", *runs, "--x", "tokens", "--output", output) == 0
    shown = ["loss", "fidelity", "kl", "eval_brier_lm", "tokens_per_second"]
    assert panels_of([read_run(run) for run in runs]) == shown
    assert output.read_bytes()[:4] == b"\x89PNG"
    assert f"{output}: {', '.join(shown)} of " in capsys.readouterr().out
    loss, fidelity, kl, score, speed = figures[0].axes[:5]
    assert [list(line.get_xdata()) for line in loss.lines[:2]] == [[1920, 3840], [2880, 3840]]
    assert len({line.get_color() for line in fidelity.lines}) == 2 and len(kl.lines[1].get_xdata())
    (bars,) = score.containers
    ends = bars.lines[2][0].get_segments()
    assert ends[0][:, 1].tolist() == pytest.approx([4 - NORMAL_95 / 2, 4 + NORMAL_95 / 2])
    assert speed.get_title(loc="left") == "tokens per second"
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [str(run) for run in runs]


def test_what_training_leaves_is_drawn(trained_calm, tmp_path):
    output = tmp_path / "run.svg"
    assert calm("plot", trained_calm / "calm", "--x", "seconds", "--output", output) == 0
    assert "fidelity" in output.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none"], "RUN: none holds no log of a training"),
        (["empty"], "RUN: empty holds no log of a training"),
        (["run", "run"], "RUN: name each folder once"),
        (["run", "--output", "run.txt"], "--output must end in .png, .pdf or .svg"),
        (["run", "--output", "no/where.png"], "--output no/where.png cannot be written"),
        (["bare", "--x", "tokens"], "--x: bare has no protocol.json with its batch"),
        (["grown", "--x", "tokens"], "--x: the batch of grown was changed on the way"),
        (["slow", "--x", "seconds"], "--x seconds: slow has logged no tokens_per_second"),
        (["post", "--x", "flops"], "--x flops: the operations of the stage post of post are not"),
    ],
)
def test_mistakes(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(Path("run"))
    write_run(Path("empty"), [])
    write_run(Path("bare"), protocol={})
    write_run(Path("slow"), [{"loss": 1.0, "step": 3}])
    changed = [{"step": 4, "sequences_per_step": {"from": 8, "to": 16}}]
    write_run(Path("grown"), protocol={**PROTOCOL, "changes": changed})
    write_run(Path("post"), protocol={**PROTOCOL, "stage": "post", "options": {}})
    assert message in error_of(capsys, "plot", *words)
