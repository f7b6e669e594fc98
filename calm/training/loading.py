"""How blocks reach the processes of a training run: a part of the trainer."""

from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

__all__ = ["LoadingTrainer"]


class LoadingTrainer(Trainer):
    """transformers' `Trainer` with the data loading of `calm.training.trainer.CALMTrainer`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_EpochOrder())

    def get_train_dataloader(self) -> DataLoader:
        """As in transformers; a `PackedStream` gets to know who takes which of its blocks."""
        shares = (self.args.world_size, self.args.process_index)
        is_dispatched = self.accelerator.dispatch_batches is not False  # by the first process
        _deal(self.train_dataset, self._train_batch_size, *(() if is_dispatched else shares))
        return super().get_train_dataloader()

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

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """As in transformers; `ShuffledBlocks` have an order of their own."""
        data = self.train_dataset if train_dataset is None else train_dataset
        sampler = getattr(data, "sampler", None)
        return super()._get_train_sampler(train_dataset) if sampler is None else sampler()


def _deal(data: Any, *shares: int) -> None:
    """Tell a `PackedStream` its batch size, processes and process; other data take none."""
    deal = getattr(data, "deal", None)
    if deal is not None:
        deal(*shares)


class _EpochOrder(TrainerCallback):
    """Tells the sampler the epoch, also behind what accelerate puts around it.

    Where a resumed epoch of several processes skips batches, accelerate finds no sampler but its
    own, and another one would keep the first epoch.
    """

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
        while found is not None and not hasattr(found, "sampler"):
            found = getattr(found, "batch_sampler", None)
        set_epoch = getattr(getattr(found, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(int(state.epoch or 0))
