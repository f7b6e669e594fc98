"""How blocks reach the processes of a training run: a part of the trainer."""

from typing import Any

from torch.utils.data import DataLoader
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from calm.data.order import EpochBatches, ShuffledBlocks

__all__ = ["LoadingTrainer"]


class LoadingTrainer(Trainer):
    """transformers' `Trainer` with the data loading of `calm.training.trainer.CALMTrainer`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_EpochOrder())

    def get_train_dataloader(self) -> DataLoader:
        """As in transformers; a `PackedStream` gets to know who takes which of its blocks.

        `ShuffledBlocks` come in an order of their own.
        """
        shares = (self.args.world_size, self.args.process_index)
        is_dispatched = self.accelerator.dispatch_batches is not False  # by the first process
        _deal(self.train_dataset, self._train_batch_size, *(() if is_dispatched else shares))
        loader = super().get_train_dataloader()
        if isinstance(self.train_dataset, ShuffledBlocks):
            from accelerate import skip_first_batches  # needed nowhere else

            # A copy by accelerate, in which the sampler may be replaced.
            loader = skip_first_batches(loader, 0)
            loader.batch_sampler.batch_sampler = self.train_dataset.batches(
                self._train_batch_size,
                *(() if self.accelerator.dispatch_batches else shares),
                drop_last=self.args.dataloader_drop_last,
            )
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As in transformers, but the first process deals a stream out: it knows where it ends."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        _deal(data, self.args.eval_batch_size)
        config = self.accelerator.dataloader_config
        asked, config.dispatch_batches = config.dispatch_batches, None
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            config.dispatch_batches = asked


def _deal(data: Any, *shares: int) -> None:
    """Tell a `PackedStream` its batch size, processes and process; other data take none."""
    deal = getattr(data, "deal", None)
    if deal is not None:
        deal(*shares)


class _EpochOrder(TrainerCallback):
    """Tells `EpochBatches` the epoch, whatever accelerate has put around them."""

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Runs before batches are skipped and read."""
        found = getattr(train_dataloader, "batch_sampler", None)
        while found is not None and not isinstance(found, EpochBatches):
            found = getattr(found, "batch_sampler", None)
        if found is not None:
            found.set_epoch(int(state.epoch or 0))
