"""What is logged and measured during training.

Evaluation gathers sums and counts of each sequence from all processes and divides once: a mean of
batch means would overweight batches with few labels, and count the sequences twice that a data
loader repeats to fill the batches of all processes.
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel

from calm.errors import UserError
from calm.evaluation.bootstrap import brier_lm, brier_lm_error, standard_errors
from calm.evaluation.brier import brier_sums
from calm.evaluation.diagnostics import spread_ratio
from calm.evaluation.samplers import make_sampler
from calm.labels import Term
from calm.models import Autoencoder, ContinuousTransformer
from calm.training.monitoring.health import health_metrics, health_term

__all__ = ["check_best_metric", "logged_parts", "metrics_of", "score_sequences"]

AUTOENCODER_TERMS = ("reconstruction_loss", "kl", "accuracy", "dimension_kl")
# What `metrics_of` reports whatever the data, without standard errors.
AUTOENCODER_METRICS = ("loss", "kl", "accuracy", "collapsed")
LANGUAGE_MODEL_METRICS = ("loss", "brier1", "brier2", "brier3", "brier4", "brier_lm")


def check_best_metric(name: str | None, model: PreTrainedModel) -> None:
    """Raise a `UserError` if evaluation of `model` reports nothing called `name`.

    Without it training would end at the first evaluation.
    """
    is_autoencoder = isinstance(model, Autoencoder)
    known: tuple[str, ...] = AUTOENCODER_METRICS if is_autoencoder else LANGUAGE_MODEL_METRICS
    if _has_own_measures(model):
        known = ("loss", *_measures(model))
    if name is not None and name.removeprefix("eval_") not in known:
        raise UserError(f"metric_for_best_model must be one of {', '.join(known)}, got {name!r}")


def score_sequences(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    terms: dict[str, Term],
    *,
    loss_only: bool,
    seed: Tensor,
    first_sequence: int,
    first_of_all: int,
    num_samples: int,
) -> tuple[Tensor, Tensor]:
    """Sums of all that is measured in each sequence, and what divides them, float64 ``[B, C]``.

    The first column is the loss. Then an autoencoder has KL divergence, accuracy and the KL
    divergence of each latent dimension, a language model Brier-1 to Brier-4, the other terms
    that it has (`_parts`) and, if it is a CALM, its health (`calm.training.monitoring.health`).

    Args:
        model: an autoencoder or a language model; one with an objective that does not
            predict text has the loss and what that measures.
        inputs: ``input_ids`` and ``labels`` ``[B, T]``.
        terms: of the model's output in evaluation, one row a sequence.
        loss_only: the first column alone.
        seed: of the draws.
        first_sequence: index of the first sequence in the evaluation set; addresses the draws.
        first_of_all: the least of all processes.
        num_samples: N, draws per position.
    """
    if isinstance(model, Autoencoder):
        measured = [terms[name] for name in AUTOENCODER_TERMS]
    elif _has_own_measures(model):
        measured = [terms[name] for name in ("loss", *_measures(model))]
    else:
        measured = [terms["loss"]]
        if not loss_only:
            sampler = make_sampler(
                model, num_samples=num_samples, brier_draws=None, noise_scale=1.0, seed=seed
            )
            chunks = inputs["input_ids"].shape[1] // sampler.predictor.patch_size
            first_row = first_sequence * chunks
            scores = brier_sums(sampler, inputs["input_ids"], inputs["labels"], first_row=first_row)
            measured.append(Term(*scores))
            measured += [terms[name] for name in _parts(model)]
            if isinstance(model, ContinuousTransformer):
                measured.append(
                    health_term(
                        model, inputs, num_samples=num_samples, seed=seed,
                        first_sequence=first_sequence, first_of_all=first_of_all,
                    )
                )  # fmt: skip
    if loss_only:
        measured = measured[:1]
    sums = [term.sums.double().reshape(len(term.counts), -1) for term in measured]
    counts = [
        term.counts.double()[:, None].expand_as(columns)
        for term, columns in zip(measured, sums, strict=True)
    ]
    return torch.cat(sums, 1), torch.cat(counts, 1)


def metrics_of(model: PreTrainedModel, prediction: EvalPrediction) -> dict[str, float]:
    """Metrics of the whole evaluation set from `score_sequences` of all its sequences.

    All models: ``loss``. Autoencoder: ``kl``, ``accuracy``, ``collapsed``. Language models:
    ``brier1`` to ``brier4`` (fractions) with their standard errors ``brier1_se`` to ``brier4_se``,
    and ``brier_lm`` (0 to 100) with ``brier_lm_se``, where it is above 0. CALM: `health_metrics`,
    with an energy head ``spread_ratio`` of all sequences. Readout: ``token_loss``. An objective
    that does not predict text: the loss and what it measures, alone. NaN where nothing counts.
    """
    sums = torch.as_tensor(prediction.predictions, dtype=torch.float64)
    counts = torch.as_tensor(prediction.label_ids, dtype=torch.float64)
    means = sums.sum(0) / counts.sum(0)
    metrics = {"loss": means[0].item()}
    if len(means) == 1:
        return metrics
    if _has_own_measures(model):
        return metrics | dict(zip(_measures(model), means[1:].tolist(), strict=True))
    if isinstance(model, Autoencoder):
        metrics |= {"kl": means[1].item(), "accuracy": means[2].item()}
        return {**metrics, "collapsed": model.collapsed(means[3:]).item()}
    brier, (parts, health) = means[1:5], _named(model, means[5:])
    metrics |= {f"brier{order}": value for order, value in enumerate(brier.tolist(), 1)}
    errors = standard_errors(sums[:, 1:5], counts[:, 1]).tolist()
    errors.append(brier_lm_error(sums[:, 1:5], counts[:, 1]).item())
    names = [f"brier{order}_se" for order in range(1, 5)] + ["brier_lm_se"]
    metrics |= {n: error for n, error in zip(names, errors, strict=True) if not math.isnan(error)}
    metrics |= health
    if "fidelity" in parts:
        metrics["spread_ratio"] = spread_ratio(parts["fidelity"], parts["diversity"]).item()
    if "token_loss" in parts:
        metrics["token_loss"] = parts["token_loss"].item()
    return {**metrics, "brier_lm": brier_lm(brier).item()}


def _named(model: Any, means: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Terms of `_parts` by their names, and the health of a CALM."""
    names = _parts(model)
    rest = means[len(names) :]
    health = health_metrics(rest) if isinstance(model, ContinuousTransformer) else {}
    return dict(zip(names, means[: len(names)], strict=True)), health


def _has_own_measures(model: Any) -> bool:
    """Whether an objective alone says what is measured, see `Objective`."""
    objective = getattr(model, "objective", None)
    return objective is not None and not getattr(objective, "predicts_text", False)


def _measures(model: Any) -> tuple[str, ...]:
    """What the objective of a model, if it has one, measures beside its loss."""
    return getattr(model.objective, "measures", ()) if _has_own_measures(model) else ()


def _parts(model: Any) -> list[str]:
    """Terms of a language model's evaluation beside its loss."""
    energy = ["fidelity", "diversity"] if getattr(model, "head_type", None) == "energy" else []
    return energy + (["token_loss"] if getattr(model, "token_readout", None) is not None else [])


def logged_parts(model: Any, means: dict[str, Tensor]) -> dict[str, float]:
    """What `RunningMeans` measured beside the loss, as numbers to log.

    The KL divergence of each dimension becomes ``collapsed``: the share of dimensions whose mean
    over all chunks of the interval does not exceed the floor. The two terms of the energy loss give
    ``spread_ratio``.
    """
    parts = {name: mean for name, mean in means.items() if name not in ("loss", "dimension_kl")}
    if "dimension_kl" in means:
        parts["collapsed"] = model.collapsed(means["dimension_kl"])
    if "fidelity" in means:
        parts["spread_ratio"] = spread_ratio(means["fidelity"], means["diversity"])
    return {name: mean.item() for name, mean in parts.items()}
