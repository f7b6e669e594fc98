"""Traps of transformers' Trainer: what it does to the loss, and to random draws."""

import pytest
import tiny
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, Trainer, TrainingArguments

from calm import BaselineTransformer
from calm.models.heads.energy import EnergyGenerativeHead
from calm_kernels import EnergyHead


class Sequences(Dataset):
    def __init__(self, count):
        self.ids = tiny.tokens(batch=count)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def with_fixed_noise(self, hidden, _noise, num_samples, *_address, **_options):
    """`EnergyHead.sample` with the same draws for every patch, however the batch is cut."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(num_samples, self.noise_size, generator=generator) - 0.5
    noise = noise[:, None, None].expand(-1, *hidden.shape[:-1], -1)
    return EnergyHead.sample(self, hidden, noise)


def baseline():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=tiny.VOCAB, num_attention_heads=2, **sizes)
    return BaselineTransformer(config)


def one_step(model, folder, *, accumulation):
    """Logged loss, gradient norm and weights after one step on eight sequences."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        logging_steps=1,
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=1e9,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Sequences(8))
    trainer.train()
    log = trainer.state.log_history[0]
    return log["loss"], log["grad_norm"], model.state_dict()


@pytest.mark.parametrize("build", [tiny.model, baseline], ids=["energy", "baseline"])
def test_accumulation_does_not_change_loss_or_gradient(tmp_path, monkeypatch, build):
    """Trap 1: a forward that seems to divide its loss itself is never divided by the steps."""
    monkeypatch.setattr(EnergyGenerativeHead, "sample", with_fixed_noise)
    loss, norm, weights = one_step(build(), tmp_path, accumulation=1)
    other_loss, other_norm, other_weights = one_step(build(), tmp_path, accumulation=4)
    assert other_loss == pytest.approx(loss, rel=1e-4)
    assert other_norm == pytest.approx(norm, rel=1e-4)
    for name, weight in weights.items():
        assert torch.allclose(weight, other_weights[name], atol=1e-6), name


@pytest.mark.parametrize("head", ["energy", "diffusion", "flow"])
def test_ranks_with_one_seed_draw_different_noise(head):
    """Trap 3: the Trainer seeds all ranks alike; here the rows of a rank tell its draws apart."""
    model, ids = tiny.model(head), tiny.tokens(batch=2)
    losses = []
    for rank in (0, 1):
        torch.manual_seed(42)  # as the Trainer does on every rank
        losses.append(model(ids, ids, seed=torch.tensor([42, 0]), first_row=2 * rank).loss)
    assert not torch.allclose(losses[0], losses[1], rtol=1e-4)


def test_evaluation_with_a_seed_leaves_the_state_of_training_alone():
    """Trap 3: evaluating neither moves the draws of training nor depends on when it happens."""
    model, ids = tiny.model().eval(), tiny.tokens()
    state = torch.get_rng_state()
    first = model(ids, ids, seed=1)
    torch.rand(3)
    assert torch.equal(first.brier1, model(ids, ids, seed=1).brier1)
    torch.set_rng_state(state)
    model(ids, ids, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_gathers_one_score_per_sequence(tmp_path):
    """Ten sequences in batches of four give ten scores and one loss, and nothing else."""
    seen = {}

    def compute_metrics(prediction):
        seen["scores"] = prediction.predictions
        return {}

    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=4, use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model=tiny.model(), args=arguments, compute_metrics=compute_metrics)
    metrics = trainer.evaluate(Sequences(10))
    assert [scores.shape for scores in seen["scores"]] == [(10,)] * 4
    assert metrics["eval_loss"] > 0
