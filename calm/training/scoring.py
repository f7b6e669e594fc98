"""Evaluation during training: sums and counts of each sequence, gathered over all processes.

A mean of batch means would overweight short batches, and count the sequences twice that a data
loader repeats to fill the batches of all processes.
"""

import math

import torch
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel
from transformers.utils import ModelOutput

from calm.evaluation.bootstrap import brier_lm, corpus_means, standard_errors
from calm.evaluation.brier import brier_sums
from calm.evaluation.samplers import make_sampler
from calm.labels import IGNORE_INDEX
from calm.models import Autoencoder

__all__ = ["metrics_of", "score_sequences"]

AUTOENCODER_METRICS = ("accuracy", "kl", "collapsed")


def score_sequences(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    outputs: ModelOutput,
    *,
    seed: Tensor,
    first_sequence: int,
    num_samples: int,
) -> tuple[Tensor, Tensor]:
    """Sums ``[B, C]`` of the metrics of `model`, and their numbers of terms ``[B]``, in float64.

    Args:
        model: an autoencoder (accuracy, KL divergence, share of collapsed dimensions; one term per
            token) or a language model (Brier-1 to Brier-4; one term per position).
        inputs: ``input_ids`` and ``labels`` ``[B, T]``.
        outputs: of the model's forward in evaluation.
        seed: of the draws.
        first_sequence: index of the first sequence in the evaluation set; addresses the draws.
        num_samples: N, draws per position.
    """
    if isinstance(model, Autoencoder):
        tokens = (inputs["labels"] != IGNORE_INDEX).sum(1).to(torch.float64)
        columns = [outputs[name].double().expand(len(tokens)) for name in AUTOENCODER_METRICS]
        return torch.stack(columns, dim=1) * tokens[:, None], tokens
    sampler = make_sampler(
        model, num_samples=num_samples, brier_draws=None, noise_scale=1.0, seed=seed
    )
    chunks = inputs["input_ids"].shape[1] // sampler.predictor.patch_size
    return brier_sums(
        sampler, inputs["input_ids"], inputs["labels"], first_row=first_sequence * chunks
    )


def metrics_of(model: PreTrainedModel, prediction: EvalPrediction) -> dict[str, float]:
    """Metrics of the whole evaluation set from `score_sequences` of all its sequences.

    Autoencoder: ``accuracy``, ``kl``, ``collapsed``. Language models: ``brier1`` to ``brier4``
    (fractions) with their standard errors ``brier1_se`` to ``brier4_se``, and ``brier_lm`` (0 to
    100).
    """
    sums = torch.as_tensor(prediction.predictions, dtype=torch.float64)
    counts = torch.as_tensor(prediction.label_ids, dtype=torch.float64)
    means = corpus_means(sums, counts)
    if isinstance(model, Autoencoder):
        return dict(zip(AUTOENCODER_METRICS, means.tolist(), strict=True))
    metrics = {f"brier{order}": value for order, value in enumerate(means.tolist(), 1)}
    errors = standard_errors(sums, counts).tolist()
    if not math.isnan(errors[0]):
        metrics |= {f"brier{order}_se": value for order, value in enumerate(errors, 1)}
    return {**metrics, "brier_lm": brier_lm(means).item()}
