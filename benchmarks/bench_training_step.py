"""A training step of the bench configuration against the reference backend."""

import pytest
import torch

from benchmarks.measure import Baseline, Requirement, compare
from benchmarks.models import as_published, autoencoder_config, calm_config
from benchmarks.shapes import STEP
from calm import Autoencoder, EnergyTransformer
from calm_kernels import use_backend

REFERENCE = "reference backend, M=100"
NUM_CHUNKS = STEP.block_size // STEP.patch_size


def make_model():
    autoencoder = Autoencoder(autoencoder_config(STEP))
    config = calm_config(STEP, num_samples=STEP.num_samples, num_targets=STEP.num_targets)
    return EnergyTransformer.from_autoencoder(autoencoder, config).train()


def draws():
    """Head and target noise of the predicted chunks, drawn as the published code does."""
    rows = STEP.batch_size * (NUM_CHUNKS - 1)
    return {
        "head_noise": torch.rand(STEP.num_samples, rows, STEP.noise_size) - 0.5,
        "target_noise": torch.randn(STEP.num_targets, rows, STEP.latent_size),
    }


class Training:
    """Steps of a model with one backend, at a learning rate of 0."""

    def __init__(self, model, backend):
        self.model, self.backend = model, backend
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, fused=True)

    def step(self, input_ids, **noise):
        with use_backend(self.backend):
            loss = self.model(input_ids, labels=input_ids, **noise).loss
            loss.backward()
        gradients = [p.grad for p in self.parameters]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach(), gradients


@pytest.mark.benchmark(group="training step, bench configuration")
def bench_training_step(benchmark):
    model = make_model()
    ours, reference = Training(model, "torch"), Training(as_published(model), "reference")
    input_ids = torch.randint(STEP.vocab_size, (STEP.batch_size, STEP.block_size))

    def same_step():
        given = draws()
        loss, gradients = ours.step(input_ids, **given)
        expected_loss, expected_gradients = reference.step(input_ids, **given)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradients, expected_gradients, rtol=2e-2, atol=2e-5)

    compare(
        benchmark,
        lambda: ours.step(input_ids),
        {REFERENCE: Baseline(lambda: reference.step(input_ids, **draws()), same_step)},
        shape=STEP,
        requirements=(Requirement(REFERENCE, min_speedup=1.8, max_memory_share=0.6),),
    )
