"""Trains models whose weights are sharded, in several processes on the CPU."""

import json
from functools import partial
from unittest import mock

import tiny
from tiny_models import tiny_baseline
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from training_cases import MODELS, UnevenSequences, history, make_trainer

from calm.data.tokenizer import byte_tokenizer
from calm.errors import UserError
from calm.training.monitoring import health
from calm.training.objectives.distilling import DistillationArguments, DistillationObjective
from calm.training.objectives.post_training import PostTrainingArguments
from calm.training.objectives.teachers import Documents, TokenTeacher
from calm.training.post_train import learn_from
from calm.training.sharding.weights import whole_weights

STEPS, BATCH = 20, 6  # sequences of a step, whatever the number of processes
UNSCORED = ("_time", "_runtime", "_per_second", "epoch")  # of what an evaluation reports
PROMPT = [[3, 4, 5, 6, 7, 8, 9, 10]]
UNITS = ["", "mlp_generator", "transformer.layers.0", "transformer.layers.1"]


def small():
    """A model some of whose weights have fewer rows than three processes can share."""
    return tiny.model(latent_size=4, ae_fields={"latent_size": 4})


def rewarded(method):
    """One that learns from rewards."""
    model = tiny.model()
    options = PostTrainingArguments(method=method, num_draws=4, reward="repetition:1")
    learn_from(model, options, byte_tokenizer())
    return model


def distilled():
    """One that learns from a teacher."""
    model, documents = tiny.model(), Documents(None, 0)
    teacher = TokenTeacher(tiny_baseline(vocab_size=tiny.VOCAB), documents)
    arguments = DistillationArguments(teacher_draws=2, data_weight=0.5)
    model.objective = DistillationObjective(arguments, teacher, documents)
    return model


BUILD = {
    **MODELS,
    "small": small,
    "tempered": tiny.temperature_learner,
    "tilted": partial(rewarded, "tilted"),
    "policy": partial(rewarded, "policy"),
    "distilled": distilled,
}


def trainer_of(name, folder, processes=1, **settings):
    """A trainer of one of `BUILD`; a step has the same sequences in any number of processes."""
    settings = {"max_steps": STEPS, "learning_rate": 1e-3, "fsdp": processes > 1, **settings}
    batch = BATCH // processes // settings.get("gradient_accumulation_steps", 1)
    return make_trainer(
        BUILD[name](),
        folder,
        data=UnevenSequences(12),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        eval_num_samples=2,
        prediction_loss_only=name == "diffusion",  # its draws take a hundred steps
        **settings,
    )


def results_of(trainer):
    """What a trainer logged, how its model scores and, if it writes, what it writes.

    The health of two sequences is measured: of two processes the second has none of them.
    """
    found = {name: history(trainer, name) for name in ("loss", "grad_norm")}
    with mock.patch.object(health, "POSITIONS", 6):
        scores = trainer.evaluate()
    found["scores"] = {k: v for k, v in scores.items() if not k.endswith(UNSCORED)}
    model = trainer.model
    if hasattr(model, "generate"):
        with whole_weights(model):
            text = model.generate(PROMPT, max_new_tokens=12, temperature=1.0, seed=1)
        found["text"] = text.tolist()
    return found


def train(folder, cases):
    """In each of two processes: train, evaluate, generate; results go to FOLDER/sharded.json."""
    results = {}
    for case, (name, settings) in cases.items():
        trainer = trainer_of(name, folder / case, processes=2, **settings)
        trainer.train()
        for weight, value in trainer.model.named_parameters():
            assert isinstance(value, DTensor) != weight.startswith("ae_model."), weight
        results[case] = results_of(trainer)
        trainer.save_model(folder / case / "model")
    if trainer.is_world_process_zero():
        (folder / "sharded.json").write_text(json.dumps(results))


def check_units(folder):
    """In each of two processes: what is gathered together, and what needs whole weights says so."""
    model = trainer_of("energy", folder / "units", processes=2)
    model.create_optimizer()
    model = model.model
    units = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    assert sorted(units) == UNITS
    with whole_weights(model):  # before any forward pass
        model.generate(PROMPT, max_new_tokens=4, temperature=1.0, seed=1)
    try:
        model.generate(PROMPT, max_new_tokens=4, temperature=1.0, seed=1)
    except UserError as error:
        assert "whole_weights" in str(error)
    else:
        raise AssertionError("generated from parts of weights")


def go_on(folder, name, checkpoint, processes):
    """In each process: go on from a checkpoint; losses go to FOLDER/resumed.json."""
    trainer = trainer_of(name, folder, processes)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    if trainer.is_world_process_zero():
        (folder / "resumed.json").write_text(json.dumps(history(trainer, "loss")))
