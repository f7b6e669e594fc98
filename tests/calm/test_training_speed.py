"""What a log says of speed: shares of a step's time, use of the device, memory."""

import time

import pytest
import torch
from training_cases import MODELS, Sequences, history, make_trainer

from calm import flops
from calm.flops import PEAK, flops_of, peak_of
from calm.memory import peak_memory
from calm.training.monitoring import speed
from calm.training.monitoring.speed import BETWEEN, PARTS, StepTimer

CPU = torch.device("cpu")
SHARES = [f"{part}_share" for part in PARTS]


class SlowSequences(Sequences):
    """Sequences of which each takes 20 ms to read."""

    def __getitem__(self, index):
        time.sleep(0.02)
        return super().__getitem__(index)


@pytest.fixture
def drained(monkeypatch):
    """Seconds by part, of every log."""
    found, drain = [], StepTimer.drain
    monkeypatch.setattr(StepTimer, "drain", lambda self: found.append(drain(self)) or found[-1])
    return found


def test_shares_of_a_steps_time(tmp_path, monkeypatch, drained):
    """Waiting for data is data, the evaluation between two steps is no part of either."""
    settings = {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(MODELS["energy"](), tmp_path, data=SlowSequences(8), **settings)
    monkeypatch.setattr(trainer, "evaluate", lambda **_: time.sleep(0.5) or {})
    trainer.train()
    (entry,), seconds = (e for e in trainer.state.log_history if "loss" in e), drained[0]
    assert seconds.keys() == {*PARTS, BETWEEN}
    assert seconds["data"] > 2 * 8 * 0.02 and seconds[BETWEEN] > 0.5
    of_steps = sum(seconds[part] for part in PARTS)
    assert [entry[name] for name in SHARES] == [seconds[part] / of_steps for part in PARTS]
    tokens = 2 * 8 * trainer.train_dataset.ids.shape[1]
    assert tokens / entry["tokens_per_second"] > of_steps + 0.5


def test_parts_are_what_passes_between_marks(monkeypatch):
    now = iter([1.0, 3.0, 4.5, 10.0, 12.0, 12.5])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(now))
    timer = StepTimer(CPU)
    for part in (BETWEEN, "data", "forward", BETWEEN):
        timer.mark(part)
    assert timer.drain() == {"data": 2.0, "forward": 1.5, BETWEEN: 5.5}
    timer.mark("data")  # since the last mark, which another interval had
    timer.mark("data")
    assert timer.drain() == {"data": 2.5}
    assert StepTimer(CPU).drain() == {}


def test_marks_do_not_pile_up_without_logs(monkeypatch):
    """Marks a second apart, of which the oldest are added up on the way."""
    seconds = iter(range(100))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(seconds))
    monkeypatch.setattr(speed, "MOST_MARKS", 6)
    timer, held = StepTimer(CPU), []
    for _ in range(20):
        for part in ("data", "forward", "backward"):
            timer.mark(part)
            held.append(len(timer._marks))
    assert max(held) < 6
    assert timer.drain() == {"data": 19, "forward": 20, "backward": 20}  # the first has no begin


@pytest.mark.parametrize("name", ["energy", "baseline", "autoencoder"])
def test_use_of_the_device(name, tmp_path, monkeypatch, drained):
    """Of one that can do 10⁹ operations a second, in the time that its steps take."""
    monkeypatch.setattr(speed, "peak_of", lambda _: 1e9)
    trainer = make_trainer(MODELS[name](), tmp_path, logging_steps=2)
    trainer.train()
    tokens, length = trainer.train_dataset.ids.size, trainer.train_dataset.ids.shape[1]
    context = length // getattr(trainer.model, "patch_size", 1)
    operations = 2 * tokens * flops_of(trainer.model, context).training()
    passed = sum(drained[0].get(part, 0) for part in PARTS)
    assert history(trainer, "mfu") == [pytest.approx(operations / (passed * 1e9))]


def test_a_head_of_somebody_else_has_no_mfu_and_trains(tmp_path, monkeypatch, caplog):
    """The reason is told once."""
    model = MODELS["flow"]()
    model.generative_head.__class__ = type("OwnHead", (type(model.generative_head),), {})
    monkeypatch.setattr(flops, "DenoisingHead", flops.EnergyHead)
    monkeypatch.setattr(speed, "peak_of", lambda _: 1e9)
    trainer = make_trainer(model, tmp_path, max_steps=3)
    trainer.train()
    assert len(history(trainer, "loss")) == 3 and not history(trainer, "mfu")
    said = [record.message for record in caplog.records if "mfu" in record.message]
    assert said == ["logs have no mfu: no operations are known of a OwnHead"]


def test_what_is_not_known_is_left_out(tmp_path):
    trainer = make_trainer(MODELS["energy"](), tmp_path)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert "mfu" not in entry and entry["peak_memory_bytes"] > 2**26
    assert peak_of(CPU) is None and peak_memory(torch.device("meta")) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", PEAK),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", 165e12),
    ],
)
def test_peaks_by_name(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_of(torch.device("cuda")) == peak
