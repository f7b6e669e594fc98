"""Distillation without a teacher's logits: its draws become latents, and those a target.

After each chunk of a text the teacher draws M continuations of K tokens (teachers.py).
The frozen autoencoder gives each a posterior N_m, and the student's draws x_1 .. x_n learn with the
energy score against their mixture, exactly,

    loss = 2/n Σ_j Σ_m w_m E|x_j - y_m|^α - 1/(n(n-1)) Σ_{j≠k} |x_j - x_k|^α,   y_m ~ N_m

with w_m = 1/M. Its mean over the teacher's draws is the score against all that the teacher may say:
the energy score is linear in its target, so that a few draws are as right as many, only noisier.
The text's own chunk may join the mixture with weight λ, the others then share 1 - λ.

A student that learns on its own texts (``contexts="student"``) is corrected where it will be when
it generates. The text then gives each sequence's first chunk alone, and nothing says how it goes
on: λ must be 0. An evaluation has the teacher continue the held-out text in either case.

Shapes: B sequences, P chunks of a text, S = P - 1 that are predicted, K tokens of a chunk, M draws
of the teacher, n of the student, L latent size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calm.decoding.sampling.seeds import row_seeds
from calm.errors import UserError
from calm.evaluation.brier import evaluating
from calm.models import EnergyTransformer
from calm.models.heads.base import HeadLoss, is_recomputed
from calm.models.objective import PredictedChunks
from calm.training.flags.parser import flag
from calm.training.objectives.teachers import Documents, Teacher
from calm_kernels.energy_score import gaussian_energy_score
from calm_kernels.noise import Stream

__all__ = ["DistillationArguments", "DistillationObjective", "own_texts"]

CONTEXTS = ("data", "student")


@dataclass
class DistillationArguments:
    """What a student learns from its teacher."""

    _argument_group_name = "distillation"

    teacher_draws: int = flag(4, "M, continuations that the teacher draws after each chunk.")
    data_weight: float = flag(
        0.0,
        "Share of the text's own next chunk in the target, in [0, 1); the rest is the teacher's.",
    )
    contexts: str = flag(
        "data",
        "Where the teacher continues: in the text (data), or in texts that the student draws after "
        "the first chunk of each sequence, new in every step (student).",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.data_weight < 1:
            raise UserError(
                "data_weight must lie in [0, 1) (1 would be `calm train`, which needs no teacher), "
                f"got {self.data_weight}"
            )
        if self.contexts not in CONTEXTS:
            raise UserError(f"contexts must be {' or '.join(CONTEXTS)}, got {self.contexts!r}")
        if self.contexts == "student" and self.data_weight:
            raise UserError(
                "data_weight must be 0 with contexts=student, where no text says how the student's "
                f"goes on; got {self.data_weight}"
            )


@dataclass(frozen=True)
class DistillationObjective:
    """The loss of a student, as a `calm.models.objective.Objective`.

    Attributes:
        arguments: of the target.
        teacher: whose vocabulary is the student's; on its device.
        documents: of the student's text.
    """

    arguments: DistillationArguments
    teacher: Teacher
    documents: Documents
    predicts_text = True

    def loss(self, chunks: PredictedChunks, *, seed: Tensor, first_row: int | Tensor) -> HeadLoss:
        """See `Objective`."""
        model, text, weight = chunks.model, chunks.input_ids, chunks.weight
        config, head = model.config, model.generative_head
        if self.arguments.contexts == "student" and model.training:
            first_sequence = first_row // weight.shape[1]
            text, is_counted = own_texts(
                model, text, self.documents, seed=seed, first_sequence=first_sequence
            )
            hidden = model.hidden_states(text[:, : -model.patch_size])
            # Each sequence counts as it does in the number that divides the loss.
            share = weight.sum(1) / is_counted.sum(1)
            weight = is_counted * share[:, None]
        else:
            hidden = chunks.hidden
        mean, log_std, mixture = self._target(chunks, text, seed, first_row)
        samples = head.sample(
            hidden, None, config.num_samples, seed, first_row,
            recompute=is_recomputed(head, config.head_recompute),
        )  # fmt: skip
        score, terms = gaussian_energy_score(
            samples, mean, log_std, exponent=float(config.beta), target_weights=mixture,
            weight=weight, return_diagnostics=True,
        )  # fmt: skip
        return HeadLoss(-score, terms.fidelity, terms.diversity)

    @torch.no_grad()
    def _target(
        self, chunks: PredictedChunks, text: Tensor, seed: Tensor, first_row: int | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Means and log standard deviations ``[G, B, S, L]`` of the mixture; weights ``[G, B, S]``.

        G is M, or M + 1 with the text's own chunk, the last.
        """
        model, count, own = chunks.model, self.arguments.teacher_draws, self.arguments.data_weight
        drawn = self.teacher.continuations(
            text[:, : -model.patch_size], num_draws=count, length=model.patch_size,
            seed=seed, first_row=first_row,
        )  # fmt: skip
        encoded = [model.encode(tokens.flatten(1)) for tokens in drawn]
        if own:
            encoded.append(chunks.posterior[:2])
        mean, log_std = (torch.stack(parts) for parts in zip(*encoded, strict=True))
        weights = torch.full(mean.shape[:-1], (1 - own) / count, device=mean.device)
        if own:
            weights[-1] = own
        return mean, log_std, weights


@torch.no_grad()
def own_texts(
    model: EnergyTransformer,
    input_ids: Tensor,
    documents: Documents,
    *,
    seed: Tensor,
    first_sequence: int | Tensor,
) -> tuple[Tensor, Tensor]:
    """Texts that the student draws at T = 1 after the first chunk of each sequence.

    With start chunks a text begins with one, and the prompt is the first chunk after it; a chunk in
    which a document ends is none, the text then begins with its start chunk alone.

    Args:
        model: the student.
        input_ids: ``[B, P*K]``.
        documents: of its text.
        seed: int64 ``[2]`` of (seed, offset).
        first_sequence: global index of the first sequence; addresses the draws.

    Returns: texts of the same shape, end tokens after their end, and which of their S contexts
        count, float32 ``[B, S]``: those that the text has not ended before; the first always does.
    """
    size, (start, end) = model.patch_size, documents
    chunks = input_ids.unflatten(1, (-1, size))
    first, lead = chunks[:, 0], 0
    is_prompt = torch.ones_like(first[:, 0], dtype=torch.bool)
    if start is not None:
        lead = size
        first = torch.where((first == start).all(1, keepdim=True), chunks[:, 1], first)
        is_prompt = ~(first == end).any(1) & ~(first == start).all(1)
    prompts = [
        row if is_whole else []
        for row, is_whole in zip(first.tolist(), is_prompt.tolist(), strict=True)
    ]
    rows = torch.arange(len(first), device=first.device) + first_sequence
    with evaluating(model):
        written: Any = model.generate(
            prompts, max_length=input_ids.shape[1] - lead, temperature=1.0, method="direct",
            seed=row_seeds(seed, rows, Stream.SEQUENCE),
        )  # fmt: skip
    text = torch.full_like(input_ids, end)
    text[:, :lead] = end if start is None else start
    text[:, lead : lead + written.shape[1]] = written
    place = torch.arange(text.shape[1], device=text.device)
    is_end = (text == end) & (place >= lead + size * is_prompt[:, None])
    text = text.masked_fill(is_end.cumsum(1) > 0, end)
    has_ended = is_end.cumsum(1)[:, size - 1 : -size : size] > 0
    return text, (~has_ended).to(torch.float32)
