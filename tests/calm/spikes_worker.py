"""Trains a model whose gradient has a spike in one step, in one process or in several."""

import json

from training_cases import MODELS, history, make_trainer
from transformers import TrainerCallback

from calm.training.monitoring.spikes import GradientSpikeError

SPIKE, LAST, SAVED = 24, 28, 22  # steps


class Weights(TrainerCallback):
    """Some weights after each step: of one row that this process has."""

    def __init__(self):
        self.after = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after[state.global_step] = some_weights(model)


def some_weights(model):
    weight = model.mlp_generator.output.weight
    return getattr(weight, "to_local", lambda: weight)()[0].tolist()


def spiky(folder, policy, processes=1, **settings):
    """A trainer whose loss is multiplied by 10⁴ in step `SPIKE`; steps have four sequences."""
    trainer = make_trainer(
        MODELS["energy"](), folder, sequences=120, per_device_train_batch_size=2 // processes,
        gradient_accumulation_steps=2, max_steps=LAST, max_gradient_spike=10.0, on_spike=policy,
        **settings,
    )  # fmt: skip
    compute = trainer.compute_loss

    def spiked(model, inputs, *args, **kwargs):
        loss = compute(model, inputs, *args, **kwargs)
        return 1e4 * loss if trainer.state.global_step + 1 == SPIKE else loss

    trainer.compute_loss = spiked
    trainer.watched = Weights()
    trainer.add_callback(trainer.watched)
    return trainer


def found_in(trainer):
    """What a finished run has logged, and the steps that changed no weight."""
    weights = trainer.watched.after
    names = ("loss", "grad_norm", "skipped_steps")
    logged = {name: history(trainer, name) for name in names}
    return logged | {"same": [n for n in weights if weights.get(n - 1) == weights[n]]}


def find_spikes(folder, is_sharded):
    """In each of two processes: skip, go on and skip again, stop; results go to FOLDER/RANK.json.

    The kept batch of each run is in the folder of its name.
    """
    saving = {"save_strategy": "steps", "save_steps": SAVED, "logging_steps": 1}
    trainer = spiky(folder / "skip", "skip", 2, fsdp=is_sharded, **saving)
    trainer.train()
    again = spiky(folder / "skip", "skip", 2, fsdp=is_sharded, **saving)
    again.train(resume_from_checkpoint=str(folder / "skip" / f"checkpoint-{SAVED}"))
    results = {"skip": found_in(trainer), "again": found_in(again)}
    stopped = spiky(folder / "stop", "stop", 2, fsdp=is_sharded)
    try:
        stopped.train()
    except GradientSpikeError as error:
        results["error"] = str(error)
    last = max(stopped.watched.after)
    has_moved = stopped.watched.after[last] != some_weights(stopped.model)
    results |= {"last": last, "moved": has_moved}
    (folder / f"{trainer.args.process_index}.json").write_text(json.dumps(results))
