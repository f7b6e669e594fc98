"""What the continuous language models return, and how terms become their loss."""

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

from calm.configuration import CALMConfig
from calm.labels import Term

__all__ = ["CALMOutput", "output_of"]


@dataclass
class CALMOutput(ModelOutput):
    """What a language model's `forward` returns; None where it does not apply.

    Attributes:
        loss: mean over the predicted chunks that count, in training with the terms that the
            configuration adds. With `loss_counts`, this batch's share of it.
        fidelity: energy head: 2 mean E|x - y|^α, so that loss = fidelity - diversity.
        diversity: energy head: mean |x - x'|^α.
        token_loss: with a readout: mean cross-entropy of a token of these chunks.
        token_score: with `token_score_weight`: mean score of tokens, in training once it has
            started.
        brier1: Brier-1 of each sequence, ``[B]``, from two draws a chunk; in evaluation, K >= 4,
            without `loss_counts`.
        brier2: likewise.
        brier3: likewise.
        brier4: likewise.
        last_hidden_state: ``[B, P, H]``; without labels.
        terms: with `loss_counts`: ``loss``, that of the head alone, and those of ``fidelity`` to
            ``token_score`` that there are, as sums and counts of each sequence (``token_loss`` of
            all in training); and what the model's objective measures.
    """

    loss: Tensor | None = None
    fidelity: Tensor | None = None
    diversity: Tensor | None = None
    token_loss: Tensor | None = None
    token_score: Tensor | None = None
    brier1: Tensor | None = None
    brier2: Tensor | None = None
    brier3: Tensor | None = None
    brier4: Tensor | None = None
    last_hidden_state: Tensor | None = None
    terms: dict[str, Term] | None = None


FIELDS = frozenset(field.name for field in fields(CALMOutput))


def output_of(
    terms: dict[str, Term], config: CALMConfig, loss_counts: Tensor | None, *, is_training: bool
) -> CALMOutput:
    """Means of the terms, and the loss.

    loss = loss of the head + token_loss_weight * token_loss - token_score_weight * token_score; in
    evaluation the loss of the head alone, so that runs with and without these terms compare

    Args:
        terms: ``loss``, that of the head, others by the names of `CALMOutput`, and what an
            objective measures, which is kept among the output's terms alone.
        config: with their weights.
        loss_counts: chunks, and tokens if there is a ``token_loss``, that the loss is a mean over;
            None for those of the terms.
        is_training: whether the loss is one to learn from.
    """
    means: Any = {name: term.mean() for name, term in terms.items() if name in FIELDS}
    of_chunks, of_tokens, kept = None, None, None
    loss: Tensor = means["loss"]
    if loss_counts is not None:
        of_chunks, of_tokens = loss_counts[0], loss_counts[-1]
        loss = terms["loss"].mean(of_chunks)
        kept = {name: term.detach() for name, term in terms.items()}
    if is_training and "token_loss" in terms:
        loss = loss + config.token_loss_weight * terms["token_loss"].mean(of_tokens)
    if is_training and "token_score" in terms:
        loss = loss - config.token_score_weight * terms["token_score"].mean(of_chunks)
    return CALMOutput(**{**means, "loss": loss, "terms": kept})
