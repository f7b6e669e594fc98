"""transformers' `Trainer` for all three stages, with draws, logs and checkpoints for these models.

Every draw of a step is addressed by (seed, step) and the index of its sequence within the step's
batch. Therefore processes and accumulation steps draw different numbers, any split of a batch draws
the same ones, and a resumed run draws the same as one that was never stopped. Evaluation has a seed
of its own and does not change the generators of training.
"""

import copy
import inspect
import json
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import get_last_checkpoint, has_length

from calm.data.blocks import collate
from calm.integrity import find_non_finite, write_atomically, write_manifest
from calm.labels import IGNORE_INDEX
from calm.models.backbone import compile_layers
from calm.models.saving import without_training_parts
from calm.training.checkpoints.complete import (
    CheckpointCompletion,
    bytes_to_save,
    check_space,
    is_model_file,
    last_good_checkpoint,
)
from calm.training.checkpoints.resume import PROTOCOL, OwnSettings
from calm.training.flags.arguments import CALMTrainingArguments
from calm.training.monitoring.clock import RunLimit, TrainingClock, timed_schedule
from calm.training.monitoring.health import HealthAdvice
from calm.training.monitoring.metrics import (
    ADVICE,
    FiniteGuard,
    MeanLoss,
    NonFiniteLossError,
    RunningMeans,
)
from calm.training.monitoring.progress import print_lines
from calm.training.monitoring.scoring import logged_parts, metrics_of, score_sequences
from calm.training.monitoring.speed import BETWEEN, Speed
from calm.training.monitoring.spikes import SpikeGuard
from calm.training.muon import MuonAdamW
from calm.training.processes import agreed
from calm.training.sharding.trainer import ShardedTrainer
from calm.training.sharding.weights import whole_weights
from calm.training.text.draws import DrawAddress
from calm.training.text.loading import LoadingTrainer
from calm_kernels.noise import as_seed

__all__ = ["CALMTrainer"]


class CALMTrainer(LoadingTrainer, ShardedTrainer):
    """Trains and evaluates an `Autoencoder`, a CALM or the token baseline on packed blocks.

    Args:
        model: what to train. Parameters that need no gradient (the autoencoder of a CALM) are not
            in the optimizer.
        args: `CALMTrainingArguments`.
        protocol: settings to save beside every set of weights.
        tokens_per_character: for characters/s in the logs, which are skipped if it is None.
        options: passed to `Trainer` (datasets, tokenizer as ``processing_class``, callbacks).

    Attributes:
        clock: counts the seconds of training steps, with ``max_train_seconds``; else None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: CALMTrainingArguments,
        *,
        protocol: dict[str, Any] | None = None,
        tokens_per_character: float | None = None,
        **options: Any,
    ) -> None:
        options.setdefault("data_collator", collate)
        # transformers would delete old checkpoints before the new one has its manifest.
        args, limit = copy.copy(args), args.save_total_limit
        args.save_total_limit = None
        if args.torch_compile:
            compile_layers(model)
        super().__init__(model, args, compute_metrics=partial(metrics_of, model), **options)
        self.add_callback(CheckpointCompletion(limit))
        self.protocol = protocol or {}
        self._optimizer_settings: list[dict[str, Any]] = []
        self.add_callback(OwnSettings(self._optimizer_settings))
        self._first_step = 0
        scored: Any = model
        self._loss_counts = scored.loss_counts
        self._forward_takes = inspect.signature(model.forward).parameters.keys()
        # `compute_loss` gives a share of the step's loss, which must not be divided again.
        self.model_accepts_loss_kwargs = True
        self._mean_loss = MeanLoss()
        self.add_callback(self._mean_loss)
        self._means = RunningMeans()
        self._speed = Speed(model, args, tokens_per_character)
        self.add_callback(self._speed)
        self._guard = FiniteGuard()
        self._spikes = SpikeGuard.of(args, self.accelerator.gather)
        if self._spikes:
            self.add_callback(self._spikes)
        self._step_batches: list[dict[str, Tensor]] = []
        self._address = DrawAddress(args, self._train_batch_size)
        self._eval_batch = 0
        self.clock: TrainingClock | None = None
        if args.max_train_seconds:
            self.clock = TrainingClock(args.max_train_seconds)
            self.add_callback(self.clock)
        self.add_callback(HealthAdvice(self._share_done))
        print_lines(self, self.clock)

    # Training

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """As in transformers, or `MuonAdamW` with ``muon_learning_rate``."""
        if self.optimizer is None and self.args.muon_learning_rate:
            self.optimizer = MuonAdamW.from_arguments(model or self.model, self.args)
        optimizer = super().create_optimizer(model)
        self._optimizer_settings[:] = [
            {name: value for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> LRScheduler:
        """The learning-rate schedule: over steps, or over time with ``max_train_seconds``."""
        if self.clock is not None and self.lr_scheduler is None:
            chosen: Any = optimizer or self.optimizer
            self.lr_scheduler = timed_schedule(chosen, self.args, self.clock)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, but a finished run that is started again takes no further step."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(str(self.args.folder)) or True
        saved = Path(str(resume_from_checkpoint)) / TRAINER_STATE_NAME
        self._first_step = 0
        if saved.is_file():
            state = TrainerState.load_from_json(str(saved))
            self._first_step = state.global_step
            for limit in self._limits():
                limit.resume(state)
        self._speed.start()
        output: Any = super().train(resume_from_checkpoint, *args, **kwargs)
        return output._replace(training_loss=output.metrics["train_loss"])

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a finished run has no epoch left."""
        epochs, updates, *others, max_steps = super().set_initial_training_values(*args, **kwargs)
        is_over = any(limit.is_over for limit in self._limits())
        if is_over or self._first_step >= max_steps:
            epochs = self._first_step // updates
        return epochs, updates, *others, max_steps

    def _limits(self) -> list[RunLimit]:
        return [each for each in self.callback_handler.callbacks if isinstance(each, RunLimit)]

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor | None]:
        """The micro-batches of one step, and the counts that divide its loss.

        They run over all its micro-batches and processes, see `loss_counts` of the models.
        """
        self._speed.mark(BETWEEN)
        batches = list(islice(epoch_iterator, num_batches))
        self._speed.mark("data")
        if not batches:
            return batches, None
        self._uncount_repeats(batches[-1]["labels"])
        self._step_batches = batches
        counts = [self._loss_counts(batch["labels"]) for batch in batches]
        return batches, self.accelerator.reduce(torch.stack(counts).sum(0).to(device))

    def _uncount_repeats(self, labels: Tensor) -> None:
        """Make the labels not count of sequences that an epoch repeats in its last batches.

        A data loader does so, from the epoch's beginning, to give all processes as many sequences.
        """
        is_last = self.accelerator.gradient_state.end_of_dataloader
        if not is_last or self.args.dataloader_drop_last or not has_length(self.train_dataset):
            return
        together = self.args.world_size * self._train_batch_size
        left = len(self.train_dataset) % together or together
        own = left - self.args.process_index * self._train_batch_size
        labels[max(0, own) :] = IGNORE_INDEX

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """What one micro-batch adds to the loss of its step, with its draws addressed.

        Summed over micro-batches and averaged over processes, as gradients are, it is the mean over
        all that counts in the step.
        """
        step = self.state.global_step
        first_row = self._address.next_first_row(step)
        draws = self._draws(self.args.seed, step, first_row)
        self._speed.mark("data")
        outputs = model(**inputs, **draws, **self._progress(), loss_counts=num_items_in_batch)
        self._record(inputs, outputs, first_row)
        loss = outputs.loss * self.args.world_size
        self._mean_loss.add(loss)
        self._speed.mark("forward")
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in transformers; the time since its loss is that of the backward pass."""
        loss = super().training_step(*args, **kwargs)
        self._speed.mark("backward")
        return loss

    def _draws(self, seed: int, offset: int, first_row: int) -> dict[str, Any]:
        """Arguments that address the draws of a forward; none for a model that draws nothing."""
        if "seed" not in self._forward_takes:
            return {}
        return {"seed": self._address.seed(seed, offset), "first_row": first_row}

    def _progress(self) -> dict[str, float]:
        """The share of the training that is done, for a model whose loss depends on it."""
        return {"progress": self._share_done()} if "progress" in self._forward_takes else {}

    def _share_done(self) -> float:
        by_steps = self.state.global_step / max(1, self.state.max_steps)
        return by_steps if self.clock is None else self.clock.progress

    def _record(self, inputs: dict[str, Tensor], outputs: Any, first_row: int) -> None:
        last_row = first_row + len(inputs["input_ids"]) - 1
        self._guard.watch_loss(
            outputs.loss,
            step=self.state.global_step + 1,
            learning_rate=self._get_learning_rate(),
            where=f"sequences {first_row} to {last_row} of the batch "
            f"(process {self.args.process_index}, epoch {self.state.epoch or 0:.4f})",
        )
        self._means.add(outputs.terms)
        self._speed.add(inputs["input_ids"])

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        step, rate = self.state.global_step + 1, self._get_learning_rate()
        if not self.args.fp16:  # its loss scaler skips steps with infinite gradients
            self._guard.watch_norm(norm, step=step, learning_rate=rate)
        if self._guard.is_full:
            self._check_finite()
        if self._spikes and self._spikes.skips(norm, step, rate, self._step_batches):
            model.zero_grad()  # an optimizer passes over weights without a gradient
        return norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Always 0: transformers' estimate, 6 per weight and token, is wrong for chunks."""
        return 0

    def _check_finite(self) -> None:
        """Stop the run if a loss or gradient norm since the last check was not finite."""
        find = partial(last_good_checkpoint, self.args.folder, set_aside=False)
        self._guard.check(self.accelerator.gather, find)
        self._mean_loss.collect(self.accelerator.gather)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the speed and the parts of the loss, averaged since the last log, with the loss.

        ``train_loss`` is the mean of all steps of the run, those before a resume included.
        """
        if "loss" in logs or "train_loss" in logs:
            self._check_finite()
        if "loss" in logs:
            means = self._means.drain(self.accelerator.gather)
            logs |= logged_parts(self.accelerator.unwrap_model(self.model), means)
            logs |= self._speed.drain()
            logs |= self._spikes.drain() if self._spikes else {}
        if "train_loss" in logs:
            logs["train_loss"] = self._mean_loss.mean
        if self.clock is not None:
            logs["train_seconds"] = self.clock.elapsed
        super().log(logs, start_time)

    # Evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in transformers, but without any effect on training."""
        self._check_finite()
        self._eval_batch = 0
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # a data loader draws a seed when it starts
            return super().evaluate(*args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """Sums and counts of each sequence (`score_sequences`), the loss among them.

        No mean of the batch, as transformers would average it over batches.
        """
        inputs = self._prepare_inputs(inputs)
        # Processes get equal parts of what is dealt out, also at the end of a stream.
        first_of_all = self._eval_batch * self.args.world_size * self.args.eval_batch_size
        first = first_of_all + self.args.process_index * len(inputs["labels"])
        self._eval_batch += 1
        draws = self._draws(self.args.eval_seed, 0, first)
        with torch.no_grad(), self.accelerator.autocast():
            outputs = model(**inputs, **draws, loss_counts=self._loss_counts(inputs["labels"]))
            with whole_weights(model):
                sums, counts = score_sequences(
                    self.accelerator.unwrap_model(model),
                    inputs,
                    outputs.terms,
                    loss_only=prediction_loss_only,
                    seed=as_seed(self.args.eval_seed, self.args.device),
                    first_sequence=first,
                    first_of_all=first_of_all,
                    num_samples=self.args.eval_num_samples,
                )
        return None, sums, counts

    # Saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save weights, configuration, tokenizer and protocol, all that other commands need.

        A checkpoint, of an internal call, holds what training alone needs too.
        """
        self._check_finite()
        self._check_weights()
        folder = Path(output_dir or self.args.folder)
        has_state = _internal_call and not self.args.save_only_model
        agreed(self.args, lambda: self._check_space(folder, has_state=has_state))
        trained = self.accelerator.unwrap_model(self.model)
        with nullcontext() if _internal_call else without_training_parts(trained):
            super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            # A pickle that names paths of this machine; the protocol holds the settings.
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            write_atomically(folder / PROTOCOL, json.dumps(self.protocol, indent=2) + "\n")
            if not _internal_call:  # a checkpoint gets its manifest once its state is saved too
                write_manifest(folder, is_model_file)

    def _check_space(self, folder: Path, *, has_state: bool) -> None:
        if self.args.should_save:
            check_space(folder, bytes_to_save(self.model, self.optimizer if has_state else None))

    def _check_weights(self) -> None:
        """Stop the run if an update left a weight that is not finite: no loss has seen it yet."""
        name = find_non_finite(self.model.named_parameters())
        flag = torch.full((1,), int(name is not None), device=self.args.device)
        if self.accelerator.gather(flag).any():
            good = last_good_checkpoint(self.args.folder, set_aside=False)
            raise NonFiniteLossError(
                f"weight {name or 'of another process'} is not finite after step "
                f"{self.state.global_step}, nothing is saved; the last good checkpoint is "
                f"{good or 'none'}; {ADVICE}"
            )
