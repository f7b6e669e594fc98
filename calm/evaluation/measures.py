"""What a text says of a model beside BrierLM, at every chunk (of the baseline, at every token).

Draws are addressed by the seed and the place of the chunk: two models with one layout of the text
get the same noise, and their differences are paired (`calm.evaluation.paired`).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calm.decoding.sampling.seeds import advance
from calm.errors import UserError
from calm.evaluation.bootstrap import corpus_means, standard_errors
from calm.evaluation.brier import evaluating
from calm.evaluation.diagnostics import (
    conditioning_gap,
    draw_agreement,
    energy_floor,
    vote_margin,
)
from calm.evaluation.samplers import DRAWS_AT_A_TIME, LOGITS_AT_A_TIME
from calm.evaluation.scores import Block, TextReader, TextScores
from calm.models.continuous import ContinuousTransformer
from calm_kernels.energy_score import gaussian_energy_score
from calm_kernels.noise import Stream, as_seed
from calm_kernels.uniform_draws import normal_draws

__all__ = [
    "BASELINE_MEASURES",
    "CALM_MEASURES",
    "TextMeasures",
    "measure_sequences",
    "measure_text",
    "ratios_of",
    "tokens_per_byte",
]

CALM_MEASURES: tuple[str, ...] = (
    "energy", "fidelity", "diversity", "floor", "conditioning_gap", "draw_agreement",
    "vote_margin", "reconstruction",
)  # fmt: skip
# What the table says of each value, in its order.
LABELS = {
    "reconstruction": ("reconstruction", "share of tokens the autoencoder gives back"),
    "energy": ("energy loss", "fidelity - diversity; lower is better"),
    "fidelity": ("  fidelity", "2 E|x - y|, draws to the truth"),
    "diversity": ("  diversity", "E|x - x'|, draws to each other"),
    "floor": ("  floor", "E|y - y'|, of the autoencoder's posterior alone"),
    "excess": ("  excess", "energy loss - floor: the part a model can lower"),
    "conditioning_gap": ("conditioning gap", "loss with another position's state - loss"),
    "spread_ratio": ("spread ratio", "1 where draws are as wide as the truth"),
    "draw_agreement": ("draw agreement", "chance that two draws are one chunk"),
    "vote_margin": ("vote margin", "winner - runner-up, share of the draws"),
    "collapsed": ("collapsed", "share of latent dimensions at the floor of their KL"),
    "cross_entropy": ("cross-entropy", "nats a token"),
    "bits": ("bits", "a chunk, -log2 of its probability under the readout"),
    "bits_per_byte": ("bits per byte", "of the text, end tokens included in the bits"),
}
BASELINE_MEASURES: tuple[str, ...] = ("cross_entropy",)


@dataclass(frozen=True)
class TextMeasures:
    """Measures of a text.

    Attributes:
        scores: one column for each of `CALM_MEASURES`, of `BASELINE_MEASURES`, or of
            `calm.evaluation.readout_bits.BITS`.
        dimension_kl: of a CALM, mean KL divergence of each latent dimension, ``[L]``.
        collapsed: share of dimensions in which it does not exceed the floor of the loss.
    """

    scores: TextScores
    dimension_kl: Tensor | None = None
    collapsed: float | None = None

    def values(self) -> dict[str, float]:
        """Means over all positions, and what follows from them.

        For a CALM: ``excess`` = energy - floor, `ratios_of` and ``collapsed``. For the baseline:
        ``cross_entropy`` in nats a token. For a readout: ``bits`` a chunk.
        """
        means = corpus_means(*self.scores.sums())
        named = dict(zip(self.scores.names, means.tolist(), strict=True))
        if self.collapsed is None:
            return named
        return {
            **named,
            "excess": named["energy"] - named["floor"],
            **ratios_of(named),
            "collapsed": self.collapsed,
        }

    def to_table(self, values: Mapping[str, float]) -> str:
        """`values` (of `values`, and more that `LABELS` knows) with their errors, for people."""
        errors = self.standard_errors()
        rows = [f"{'':17} {'value':>9} {'SE':>8}"]
        for name, (label, about) in LABELS.items():
            if name in values:
                error = errors.get(name, math.nan)
                shown = "" if math.isnan(error) else f"{error:.4f}"
                rows.append(f"{label:17} {values[name]:9.4f} {shown:>8}   {about}")
        return "\n".join(rows)

    def standard_errors(self) -> dict[str, float]:
        """Of the means over all positions, between blocks; NaN with a single block."""
        errors = standard_errors(*self.scores.sums()).tolist()
        return dict(zip(self.scores.names, errors, strict=True))


def measure_text(
    model: PreTrainedModel,
    blocks: Iterable[Block],
    *,
    num_samples: int = 8,
    noise_scale: float = 1.0,
    noise_spread: float = 1.0,
    exponent: float = 1.0,
    seed: int = 0,
    batch_size: int = 4,
    max_blocks: int | None = None,
    progress: Callable[[Iterator[Any]], Iterable[Any]] = iter,
    describe: Mapping[str, Any] | None = None,
) -> TextMeasures:
    """Measures of `model` at every predicted chunk or token of `blocks` that counts.

    Args:
        model: a CALM with any head, or the token baseline.
        blocks: as `calm.evaluation.scores.score_text`.
        num_samples: N >= 2, draws of each chunk.
        noise_scale: factor on the head's noise.
        noise_spread: factor on what the noise contributes.
        exponent: α of the energy score, whatever the model was trained with.
        seed: of the draws.
        batch_size: blocks in one forward pass; does not change the result.
        max_blocks: stop after this many blocks.
        progress: wraps the iterator over batches.
        describe: what else to record in the protocol.

    Raises:
        UserError: no blocks, blocks of different lengths, no position that counts.
    """
    device = next(model.parameters()).device
    reader = TextReader(blocks, batch_size, max_blocks, progress)
    settings: dict[str, Any] = {"positions_are": "every predicted token", "seed": seed}
    dimension_kl: Tensor | None = None
    probe: _Probe | None = None
    if isinstance(model, ContinuousTransformer):
        if num_samples < 2:
            raise UserError(f"num_samples must be at least 2, got {num_samples}")
        draws = {"noise_scale": noise_scale, "noise_spread": noise_spread}
        probe = _Probe(model, num_samples, exponent, as_seed(seed, device), draws)
        settings["positions_are"] = f"every predicted chunk of {model.patch_size} tokens"
        settings |= {"num_samples": num_samples, **draws, "exponent": exponent}
    with evaluating(model):
        for input_ids, labels, first_block in reader:
            ids, wanted = input_ids.to(device), labels.to(device)
            if probe is None:
                reader.add(*_token_measures(model, ids, wanted))
                continue
            terms, is_counted, token, kl = probe.measure(ids, wanted, first_block)
            reader.add(terms, is_counted, token)
            dimension_kl = kl if dimension_kl is None else dimension_kl + kl
    names = BASELINE_MEASURES if probe is None else CALM_MEASURES
    scores = reader.scores(model, names, describe or {}, settings)
    if not len(scores.offsets):
        raise UserError("no position is left to measure: all of the text is masked")
    if probe is None or dimension_kl is None:
        return TextMeasures(scores)
    dimension_kl = dimension_kl.cpu() / len(scores.offsets)
    return TextMeasures(scores, dimension_kl, probe.model.ae_model.collapsed(dimension_kl).item())


def measure_sequences(
    model: PreTrainedModel,
    input_ids: Tensor,
    labels: Tensor,
    *,
    num_samples: int,
    seed: Tensor,
    first_sequence: int = 0,
) -> tuple[Tensor, Tensor]:
    """`CALM_MEASURES` of each sequence, as sums and what divides them.

    Args:
        model: a CALM with any head, in evaluation mode.
        input_ids: ``[B, T]``.
        labels: likewise.
        num_samples: N >= 2, draws of each chunk.
        seed: int64 ``[2]``, of the draws.
        first_sequence: index of the first sequence in its text; addresses the draws.

    Returns: sums over the predicted chunks that count, float64 ``[B, C]``; their number ``[B]``.
    """
    probe = _Probe(model, num_samples, 1.0, seed, {"noise_scale": 1.0, "noise_spread": 1.0})
    terms, is_counted, _, _ = probe.measure(input_ids, labels, first_sequence)
    return (terms * is_counted[..., None]).sum(1), is_counted.sum(1)


def ratios_of(means: Mapping[str, float]) -> dict[str, float]:
    """What follows from means of `CALM_MEASURES`, see `calm.evaluation.diagnostics`.

    ``floor_share`` = floor / energy, ``conditioning_share`` = conditioning_gap / energy,
    ``spread_ratio`` = 2 diversity / fidelity. NaN where nothing was measured.
    """
    return {
        "floor_share": _ratio(means["floor"], means["energy"]),
        "conditioning_share": _ratio(means["conditioning_gap"], means["energy"]),
        "spread_ratio": _ratio(2 * means["diversity"], means["fidelity"]),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def tokens_per_byte(tokenizer: Any, tokens: Tensor) -> float:
    """How many of `tokens` stand for a byte of their text; special tokens stand for none."""
    text = tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
    return len(tokens) / max(1, len(text.encode("utf-8", "replace")))


def _token_measures(model: Any, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of each predicted token ``[B, T-1, 1]``, which count, and where they are."""
    hidden = model.model(input_ids=input_ids[:, :-1], use_cache=False).last_hidden_state
    wanted = labels[:, 1:]
    size = max(1, LOGITS_AT_A_TIME // model.config.vocab_size)
    losses = [
        torch.nn.functional.cross_entropy(model.lm_head(part).float(), target, reduction="none")
        for part, target in zip(
            hidden.flatten(0, 1).split(size), wanted.clamp(min=0).flatten().split(size), strict=True
        )
    ]
    terms = torch.cat(losses).double().view(*wanted.shape, 1)
    return terms, wanted >= 0, 1 + torch.arange(wanted.shape[1])


@dataclass(frozen=True)
class _Probe:
    """Measures of a CALM: two sets of draws a chunk, the second with another hidden state.

    Attributes:
        model: a `calm.models.ContinuousTransformer`.
        num_samples: N.
        exponent: α.
        seed: int64 ``[2]``.
        draws: noise_scale and noise_spread.
    """

    model: Any
    num_samples: int
    exponent: float
    seed: Tensor
    draws: dict[str, float]

    def measure(
        self, input_ids: Tensor, labels: Tensor, first_block: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Terms ``[B, S, C]``, which count ``[B, S]``, their first token ``[S]``; KL ``[L]``."""
        model, size = self.model, self.model.patch_size
        hidden = model(input_ids[:, :-size]).last_hidden_state  # [B, S, H]
        batch, chunks = hidden.shape[:2]
        following = input_ids[:, size:]
        is_counted = labels[:, size::size] >= 0
        rows = torch.arange(batch * (chunks + 1), device=hidden.device).view(batch, -1)[:, :chunks]
        rows = first_block * (chunks + 1) + rows
        mean, log_std = (part.flatten(0, 1) for part in self._encode(following))
        own = self._latents(hidden, rows)  # [N, B*S, L]
        other = self._latents(_others(hidden, is_counted), rows)
        score, terms = gaussian_energy_score(
            own, mean, log_std, exponent=self.exponent, return_diagnostics=True
        )
        tokens = self._decoded(own)
        columns = [
            -score,
            terms.fidelity,
            terms.diversity,
            energy_floor(log_std, self.exponent),
            conditioning_gap(
                -score, -gaussian_energy_score(other, mean, log_std, exponent=self.exponent)
            ),
            draw_agreement(tokens),
            vote_margin(tokens),
            self._reconstruction(mean, log_std, rows, labels[:, size:]),
        ]
        stacked = torch.stack([column.double() for column in columns], dim=-1)
        kl = 0.5 * (mean.square() + (2 * log_std).exp() - 1) - log_std
        token = size + size * torch.arange(chunks)
        counted_kl = kl[is_counted.flatten()].double().sum(0)
        return stacked.unflatten(0, (batch, chunks)), is_counted, token, counted_kl

    def _encode(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.model.ae_model.encoder(input_ids=input_ids).float().chunk(2, dim=-1)
        return mean, log_std

    def _latents(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """N draws a position, the same noise for equal `rows`, ``[N, B*S, L]``."""
        seed = advance(self.seed, rows.flatten())
        size = max(1, DRAWS_AT_A_TIME // self.num_samples)
        parts = zip(hidden.flatten(0, 1).split(size), seed.split(size), strict=True)
        drawn = [
            self.model.distribution(part).latents(self.num_samples, own, **self.draws)
            for part, own in parts
        ]
        latents = torch.cat(drawn, dim=1)
        if not torch.isfinite(latents).all():
            raise UserError("the head drew latents that are not finite; load an earlier checkpoint")
        return latents

    def _decoded(self, latents: Tensor) -> Tensor:
        """Token ids ``[N, B*S, K]``."""
        parts = latents.split(max(1, DRAWS_AT_A_TIME // self.num_samples), dim=1)
        return torch.cat([self.model.decode_latents(part) for part in parts], dim=1)

    def _reconstruction(
        self, mean: Tensor, log_std: Tensor, rows: Tensor, labels: Tensor
    ) -> Tensor:
        """Share of a chunk's tokens that its latent, drawn from the posterior, gives back."""
        seed = advance(self.seed, rows.flatten())
        noise = normal_draws(*mean.shape, stream=Stream.LATENT, seed=seed, device=mean.device)
        latent = mean + log_std.exp() * noise
        wanted = labels.unflatten(1, (-1, self.model.patch_size)).flatten(0, 1)
        tokens = self._decoded(latent[None])[0]
        is_label = wanted >= 0
        return ((tokens == wanted) & is_label).sum(-1) / is_label.sum(-1).clamp(min=1)


def _others(hidden: Tensor, is_counted: Tensor) -> Tensor:
    """Of each counted position the hidden state of another: half the sequence's further on."""
    others = hidden.clone()
    for row, counted in enumerate(is_counted):
        places = counted.nonzero()[:, 0]
        others[row, places] = hidden[row, places.roll(math.ceil(len(places) / 2))]
    return others
