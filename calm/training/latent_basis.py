"""The last step of an autoencoder's training with ``whitening``: a basis measured on its text."""

from typing import cast

import torch
from transformers import PreTrainedModel

from calm.labels import IGNORE_INDEX
from calm.models import Autoencoder
from calm.models.whitening import LatentMoments, whiten
from calm.training.trainer import CALMTrainer

__all__ = ["is_whitened", "whiten_latent"]

CHUNKS = 2**16  # of the training text, to measure moments on, or all that an epoch has


def is_whitened(model: PreTrainedModel) -> bool:
    """Whether training ends with another basis of the latent of `model`."""
    return isinstance(model, Autoencoder) and model.config.whitening != "none"


@torch.no_grad()
def whiten_latent(trainer: CALMTrainer) -> None:
    """Give the trained autoencoder its basis, if its configuration asks for one.

    Moments are those of whole chunks without dropout, in the order of training; those of several
    processes are summed. Checkpoints have the basis that was trained: a finished run that is
    started again gets the same model again.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not is_whitened(model):
        return
    size, seen = model.patch_size, 0
    total: LatentMoments | None = None
    model.eval()
    for batch in trainer.get_train_dataloader():
        is_counted = batch["labels"][:, ::size] != IGNORE_INDEX
        found = LatentMoments.of(model.encoder(input_ids=batch["input_ids"]), is_counted)
        total = found if total is None else total.plus(found)
        seen += is_counted.numel() * trainer.args.world_size  # the same for all processes
        if seen >= CHUNKS:
            break
    summed = (trainer.accelerator.reduce(part) for part in cast(LatentMoments, total))
    whiten(model, LatentMoments(*summed), model.config.whitening)
