"""What `calm experiment gap` measures: where BrierLM of a CALM is lost.

The same chunks of a held-out text are drawn by a model's head, at several spreads of its noise, and
by readouts trained on the frozen hidden states that the head reads.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedModel

from calm.decoding.generation import make_predictor
from calm.decoding.sampling.token_draws import SlotReadout
from calm.errors import UserError
from calm.evaluation.brier import evaluating
from calm.evaluation.measures import measure_text
from calm.evaluation.readout_bits import BITS, readout_bits
from calm.evaluation.samplers import DrawSampler, ReadoutSampler, make_sampler
from calm.evaluation.scores import TextReader, TextScores, score_draws, score_text
from calm.experiments.latent_code import latent_code
from calm.experiments.latent_space import unconditional_energy
from calm.experiments.readout import FrozenStates, Readout, frozen_states, train_readout
from calm.models import ContinuousTransformer
from calm.models.agreement import prefix_collisions
from calm_kernels.noise import as_seed

__all__ = ["QUICK", "GapOptions", "Probe"]

BATCH = 16  # blocks in one forward pass
Keep = Callable[[str, Callable[[], TextScores]], TextScores]


@dataclass(frozen=True)
class GapOptions:
    """How much is measured.

    Attributes:
        num_samples: draws of a chunk, of the head and of readouts, at least 2.
        spreads: values of ``noise_spread`` beside 1.
        steps: of a readout's training.
        chunks: of the training text that readouts learn from.
        slot_blocks: blocks in which slots and energy are measured, the first ones.
        seed: of draws, readouts and bootstrap.
    """

    num_samples: int = 8
    spreads: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9, 1.1)
    steps: int = 800
    chunks: int = 200_000
    slot_blocks: int = 80
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 2), ("steps", 1), ("chunks", 1), ("slot_blocks", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")


QUICK = GapOptions(spreads=(0.7, 0.85), steps=500, chunks=100_000, slot_blocks=20)


class Probe:
    """The scores of a model, its readouts and its baseline on one text, each computed once.

    Args:
        model: a CALM.
        blocks: the held-out text, as `calm.evaluation.scores.score_text`.
        training: the text that readouts learn from, indexed; no document of it may be in `blocks`.
        options: how much is measured.
        keep: gives the scores of a name that it has, else computes and keeps them.
        describe: what protocols record beside the settings.
    """

    def __init__(
        self,
        model: ContinuousTransformer,
        blocks: Any,
        training: Any,
        options: GapOptions,
        *,
        keep: Keep = lambda name, compute: compute(),
        describe: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.blocks, self.options = model, blocks, options
        self._training, self._keep, self._describe = training, keep, dict(describe or {})
        self._readouts: dict[str, Readout] = {}

    @cached_property
    def states(self) -> FrozenStates:
        """What readouts learn from."""
        return frozen_states(self.model, self._training, self.options.chunks)

    def draws(self, spread: float = 1.0) -> TextScores:
        """Brier-n of the head's draws."""
        options = self.options
        return self._keep(
            f"draws-{spread:g}",
            partial(
                score_text, self.model, self.blocks, num_samples=options.num_samples,
                noise_spread=spread, seed=options.seed, batch_size=BATCH, describe=self._describe,
            ),
        )  # fmt: skip

    def readout(self, name: str) -> TextScores:
        """Brier-n of a readout's draws: ``independent`` or ``causal``, or the model's ``own``."""
        settings = {
            "num_samples": self.options.num_samples, "seed": self.options.seed,
            "readout": name, "steps": self.options.steps,
        }  # fmt: skip
        return self._keep(
            name,
            lambda: score_draws(
                self._sampler(name), self.blocks, settings=settings, batch_size=BATCH,
                describe=self._describe,
            ),
        )  # fmt: skip

    def bits(self, name: str) -> TextScores:
        """Bits of each whole chunk under a readout; names as `readout`."""
        return self._keep(
            f"{name}-bits",
            lambda: readout_bits(
                self.model, self._readout(name), self.blocks, batch_size=BATCH,
                describe=self._describe,
            ),
        )  # fmt: skip

    def slots(self, name: str) -> TextScores:
        """How often a slot's draws are right and how often two agree; ``draws``: of the head."""
        return self._keep(
            f"{name}-slots",
            lambda: _slot_shares(
                self._head_sampler() if name == "draws" else self._sampler(name),
                self.blocks, self.options.slot_blocks, self._describe,
            ),
        )  # fmt: skip

    def latent(self) -> dict[str, float]:
        """The code of the autoencoder, and how well the head predicts it.

        As `calm.experiments.latent_code.LatentCode` and
        `calm.evaluation.measures.TextMeasures.values` name them; ``unconditional``: excess of a
        head that ignores the text; ``predicted``: 1 - excess / unconditional. ``additivity`` is
        missing where the text is too short for it.
        """
        options, rows = self.options, list(self.blocks)
        found = measure_text(
            self.model, rows, num_samples=options.num_samples, seed=options.seed,
            batch_size=BATCH, max_blocks=options.slot_blocks,
        ).values()  # fmt: skip
        energy = unconditional_energy(self.model, rows[: options.slot_blocks])
        unconditional = energy - found["floor"]
        names = ("energy", "floor", "excess", "spread_ratio", "reconstruction")
        code = asdict(latent_code(self.model, rows))
        return {
            **{name: value for name, value in code.items() if value is not None},
            **{name: found[name] for name in names},
            "unconditional": unconditional,
            "predicted": 1 - found["excess"] / unconditional,
        }

    def baseline(self, model: PreTrainedModel, blocks: Any, digest: str) -> TextScores:
        """Brier-n of the token baseline; `digest` tells its scores from another's."""
        return self._keep(
            f"baseline-{digest}",
            partial(
                score_text, model, blocks, seed=self.options.seed, batch_size=BATCH,
                describe={**self._describe, "model": "baseline"},
            ),
        )  # fmt: skip

    def baseline_bits(self, model: PreTrainedModel, blocks: Any, digest: str) -> TextScores:
        """Bits of K tokens of the baseline, from every token on."""
        return self._keep(
            f"baseline-{digest}-bits",
            lambda: _bits_of_chunks(
                measure_text(model, blocks, batch_size=BATCH, describe=self._describe).scores,
                self.model.patch_size,
            ),
        )

    def _readout(self, name: str) -> SlotReadout:
        if name == "own":
            return self.model.slot_readout()
        if name not in self._readouts:
            self._readouts[name] = train_readout(
                self.states, self.model.config.vocab_size, is_causal=name == "causal",
                steps=self.options.steps, seed=self.options.seed,
            )  # fmt: skip
        return self._readouts[name]

    def _sampler(self, name: str) -> ReadoutSampler:
        predictor: Any = make_predictor(self.model, method="direct", temperature=1.0)
        seed = as_seed(self.options.seed, self.model.device)
        return ReadoutSampler(predictor, self.options.num_samples, False, seed, self._readout(name))

    def _head_sampler(self) -> DrawSampler:
        sampler = make_sampler(
            self.model, num_samples=self.options.num_samples, brier_draws=None, noise_scale=1.0,
            seed=as_seed(self.options.seed, self.model.device),
        )  # fmt: skip
        assert isinstance(sampler, DrawSampler)  # of a CALM
        return sampler


def _slot_shares(
    sampler: DrawSampler, blocks: Any, limit: int, describe: Mapping[str, Any]
) -> TextScores:
    """Share of draws that are right, and of pairs that agree, slot by slot; 2 K scores a chunk."""
    model: Any = sampler.predictor.model
    size = model.patch_size
    reader = TextReader(islice(blocks, limit), BATCH, None, iter)
    with evaluating(model):
        for input_ids, labels, first in reader:
            hidden = model(input_ids[:, :-size].to(model.device)).last_hidden_state
            batch, chunks = hidden.shape[:2]
            rows = torch.arange(batch * (chunks + 1), device=hidden.device)
            rows = (first * (chunks + 1) + rows).view(batch, -1)[:, :chunks]
            draws = sampler.draws(hidden, None, rows)  # [N, B, S, K]
            wanted = labels[:, size:].to(hidden.device).unflatten(1, (-1, size))
            right = (draws == wanted).double().mean(0)
            agreeing = prefix_collisions(draws[..., None])[..., 0].double()
            reader.add(
                torch.cat([right, agreeing], dim=-1), (wanted >= 0).all(-1),
                size + size * torch.arange(chunks),
            )  # fmt: skip
    names = [f"{what}{slot + 1}" for what in ("match", "collision") for slot in range(size)]
    settings = {
        "positions_are": f"every predicted chunk of {size} tokens that all count",
        "num_samples": sampler.num_draws,
    }
    return reader.scores(model, tuple(names), describe, settings)


def _bits_of_chunks(scores: TextScores, size: int) -> TextScores:
    """From nats of single tokens to bits of `size` tokens, wherever so many follow in a block."""
    bits = scores.terms.unfold(0, size, 1).sum(-1) / math.log(2)
    first, last = scores.offsets[: len(bits)], scores.offsets[size - 1 :]
    blocks = scores.blocks[: len(bits)]
    is_whole = (last - first == size - 1) & (blocks == scores.blocks[size - 1 :])
    return replace(scores, offsets=first, terms=bits, blocks=blocks, names=BITS).select(is_whole)
