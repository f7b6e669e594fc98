"""The work that both processes do; a subclass says how its model is loaded and called.

Tensors travel as files of `torch.save`. Draws are a dictionary of tensors: ``head_noise``
``[N, R, noise_size]``, U[-1/2, 1/2), and ``target_noise`` ``[M, R, L]``, N(0, 1), for the R
predicted chunks of a batch.
"""

import resource
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ModelWork"]

LEARNING_RATE, BETAS, WEIGHT_DECAY, MAX_GRADIENT_NORM = 3e-4, (0.9, 0.95), 0.1, 1.0
Draws = dict[str, Tensor]


class ModelWork(ABC):
    """Commands on one model; every command returns what JSON can hold."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Versions of the packages that matter."""

    @abstractmethod
    def read_model(self, folder: str, autoencoder: str) -> nn.Module:
        """The language model of a checkpoint folder, in float32."""

    @abstractmethod
    def output(self, input_ids: Tensor, draws: Draws | None) -> Any:
        """The model's output with labels; with its default draws if None are given."""

    @abstractmethod
    def parts(self, input_ids: Tensor, draws: Draws) -> dict[str, Tensor]:
        """Posterior of the next chunks, hidden states, latents and logits."""

    @abstractmethod
    def text(self, prompt: Tensor, new_tokens: int, temperature: float, seed: int) -> Tensor:
        """The prompt with its continuation."""

    def handlers(self) -> Mapping[str, Callable[..., Any]]:
        """Commands by name."""
        names = (
            "versions", "load", "write_parts", "train_with_draws", "mean_loss", "scores",
            "time_training", "time_evaluation", "time_text", "peak_memory_mib",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def load(self, folder: str, autoencoder: str) -> None:
        """Replace the model."""
        self.model = nn.Module()  # the one before is freed first
        self.model = self.read_model(folder, autoencoder)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )

    def train_mode(self) -> None:
        """Training mode, except for the frozen autoencoder."""
        self.model.train()
        self.model.ae_model.eval()

    # Parity

    @torch.no_grad()
    def write_parts(self, inputs: str, draws: str, result: str) -> None:
        """`parts` as a file."""
        self.model.eval()
        torch.save(self.parts(torch.load(inputs), torch.load(draws)), result)

    def train_with_draws(self, inputs: str, draws: str, steps: int, result: str) -> list[float]:
        """Losses of some training steps with given draws; the first gradients as a file."""
        self.train_mode()
        input_ids, given, losses = torch.load(inputs), torch.load(draws), []
        for step in range(steps):
            losses.append(self._backward(input_ids, given))
            if step == 0:
                named = self.model.named_parameters()
                torch.save({name: p.grad for name, p in named if p.grad is not None}, result)
            self._update()
        return losses

    @torch.no_grad()
    def mean_loss(self, inputs: str, repeats: int) -> tuple[float, float]:
        """Mean and standard error of the training loss with the model's own draws."""
        self.train_mode()
        input_ids = torch.load(inputs)
        losses = [self.output(input_ids, None).loss.item() for _ in range(repeats)]
        return statistics.mean(losses), statistics.stdev(losses) / repeats**0.5

    @torch.no_grad()
    def scores(self, inputs: str, draws: str) -> dict[str, float]:
        """Evaluation loss and Brier scores with given draws."""
        self.model.eval()
        output = self.output(torch.load(inputs), torch.load(draws))
        names = ("loss", "brier1", "brier2", "brier3", "brier4")
        return {name: output[name].mean().item() for name in names}

    # Times, in milliseconds

    def time_training(self, inputs: str) -> float:
        """One training step: forward, backward, AdamW."""
        self.train_mode()
        input_ids = torch.load(inputs)

        def step() -> None:
            self._backward(input_ids, None)
            self._update()

        return milliseconds(step)

    @torch.no_grad()
    def time_evaluation(self, inputs: str) -> float:
        """One forward in evaluation mode: loss and Brier scores."""
        self.model.eval()
        input_ids = torch.load(inputs)
        return milliseconds(lambda: self.output(input_ids, None).loss.item())

    def time_text(self, inputs: str, new_tokens: int, temperature: float, seed: int) -> float:
        """One prompt continued."""
        self.model.eval()
        prompt = torch.load(inputs)
        return milliseconds(lambda: self.text(prompt, new_tokens, temperature, seed))

    def peak_memory_mib(self) -> float:
        """Largest resident memory that this process ever had."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB

    def _backward(self, input_ids: Tensor, draws: Draws | None) -> float:
        """Loss and gradients."""
        loss = self.output(input_ids, draws).loss
        loss.backward()
        return loss.item()

    def _update(self) -> None:
        """One AdamW step on clipped gradients."""
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()


def milliseconds(run: Callable[[], object]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3
