"""transformers' `Trainer` with weights that `shard_model` splits, where ``fsdp`` asks for it.

accelerate says whether weights are sharded (``--fsdp``, or the settings of ``accelerate launch``)
and writes the shards of a checkpoint. What is gathered together is decided by `shard_model`, not by
accelerate: a model that is sharded already stays as it is there. On a CPU, where accelerate would
run plain data parallelism without a word, weights are sharded all the same.
"""

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch.distributed import init_device_mesh
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, Trainer
from transformers.trainer import SCHEDULER_NAME

from calm.errors import UserError
from calm.training.flags.arguments import CALMTrainingArguments
from calm.training.sharding.checkpoints import (
    has_shards,
    load_model_shards,
    load_optimizer_shards,
    save_description,
)
from calm.training.sharding.weights import is_sharded, mixed_precision, shard_model

__all__ = ["ShardedTrainer"]


class ShardedTrainer(Trainer):
    """As `Trainer`; with ``fsdp``, weights are sharded before the optimizer is made."""

    args: CALMTrainingArguments
    model: PreTrainedModel

    def create_accelerator_and_postprocess(self) -> None:
        """As in transformers; ``fsdp`` on a CPU is no plain data parallelism."""
        super().create_accelerator_and_postprocess()
        if not self.args.is_sharded:
            return
        state: Any = self.accelerator.state
        if self.args.device.type == "cpu":
            from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(
                **(self.args.fsdp_plugin_args or {"fsdp_version": 2})
            )
            self.is_fsdp_enabled = True
        # Else whole gradients would wait for the last micro-batch of a step.
        self.accelerator.gradient_state.plugin_kwargs.setdefault("sync_each_batch", True)
        plugin = state.fsdp_plugin
        plugin.auto_wrap_policy = None  # `shard_model` decides
        plugin.state_dict_config = plugin.optim_state_dict_config = None  # those of whole weights
        plugin.set_state_dict_type("SHARDED_STATE_DICT")

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """As in transformers, of sharded weights where they are."""
        if self.args.is_sharded and not is_sharded(self.model):
            self._shard()
        optimizer = super().create_optimizer(model)
        self._weights = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> LRScheduler:
        """As in transformers, for the weights that the optimizer was made of.

        accelerate has just looked them up by their addresses, as it must for weights that it shards
        itself. But weights without a row in this process all have the address 0.
        """
        if is_sharded(self.model):
            chosen: Any = optimizer or self.optimizer
            for group, weights in zip(chosen.param_groups, self._weights, strict=True):
                group["params"] = list(weights)
        return super().create_scheduler(num_training_steps, optimizer)

    def _shard(self) -> None:
        device, plugin = self.args.device, self.accelerator.state.fsdp_plugin
        mesh = getattr(self.accelerator, "torch_device_mesh", None)
        if mesh is None:
            mesh = init_device_mesh(device.type, (self.args.world_size,))
        shard_model(
            self.model,
            mesh,
            mixed_precision(torch.bfloat16 if self.args.bf16 else None),
            reshard_after_forward=plugin.reshard_after_forward,
        )

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """As in transformers, and under autocast, which accelerate leaves out of sharded models."""
        stack = super().compute_loss_context_manager()
        if is_sharded(self.model):
            stack.enter_context(self.accelerator.autocast())
        return stack

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers; a checkpoint of a sharded model gets its weights in shards, later."""
        if not is_sharded(self.model):
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or self.args.folder)
        if not _internal_call:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            weights = get_model_state_dict(self.model, options=options)
            self._save(str(folder), state_dict=weights)
        elif self.args.should_save:
            save_description(self.model, folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As in transformers; shards are read by any number of processes, sharded or not."""
        folder = Path(resume_from_checkpoint)
        if has_shards(folder):
            load_model_shards(folder, self.model)
            return
        if is_sharded(self.model):
            raise UserError(
                f"fsdp: the weights in {folder} are whole, and its optimizer's state is: go on "
                "without fsdp, or begin another output_dir with these weights "
                f"(--model_name_or_path {folder})"
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Likewise."""
        best = self.state.best_model_checkpoint
        if best is not None and has_shards(Path(best)):
            load_model_shards(Path(best), self.model)
        else:
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Likewise."""
        if checkpoint is None or not has_shards(Path(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        load_optimizer_shards(Path(checkpoint), self.model, optimizer)
        saved = torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True)
        scheduler.load_state_dict(saved)
