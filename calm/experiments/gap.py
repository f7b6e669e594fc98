"""`calm experiment gap`: where BrierLM of a trained CALM is lost.

The folder of a probe holds ``results.json``, ``report.md`` and ``report.png``, and in ``scores``
what was scored so far: a run that was interrupted goes on with the first part that is missing.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calm.evaluation.measures import tokens_per_byte
from calm.evaluation.paired import common_positions
from calm.evaluation.scores import TextScores
from calm.experiments.gap_losses import Gap, difference, losses_of, mean_of
from calm.experiments.gap_measures import GapOptions, Probe
from calm.experiments.gap_plot import plot_gap
from calm.experiments.gap_report import to_markdown
from calm.experiments.gap_store import GapStore
from calm.integrity import weights_hash
from calm.models import ContinuousTransformer
from calm.training.checkpoints.resume import model_settings

__all__ = ["Baseline", "configuration_of", "measure_gap", "write_gap"]

DIGEST_LENGTH = 12
READOUTS = ("independent", "causal")  # that are trained


@dataclass(frozen=True)
class Baseline:
    """The token baseline, and the text as it reads it."""

    model: PreTrainedModel
    blocks: Any


def configuration_of(
    model: ContinuousTransformer, options: GapOptions, text: dict[str, Any]
) -> dict[str, Any]:
    """What decides the scores of a probe: weights, settings and `text`, which says what is read."""
    settings = {f"model.{name}": value for name, value in model_settings(model).items()}
    return {"weights": weights_hash(model), **settings, **text, **asdict(options)}


def measure_gap(
    model: ContinuousTransformer,
    blocks: Any,
    training: Any,
    options: GapOptions,
    store: GapStore,
    *,
    tokenizer: PreTrainedTokenizerBase,
    measured_on: dict[str, Any],
    baseline: Baseline | None = None,
) -> Gap:
    """Measure what `store` lacks, and put all of it together.

    Args:
        model: a CALM, in evaluation mode.
        blocks: the held-out text, as the model reads it.
        training: the text that readouts learn from, see `Probe`.
        options: how much is measured.
        store: of the folder.
        tokenizer: of the model.
        measured_on: what the report says of model and text; ``tokenizer_hash`` is compared.
        baseline: the token baseline, and the same text.
    """
    probe = Probe(model, blocks, training, options, keep=store.scores, describe=measured_on)
    named = {"draws": probe.draws()}
    bits = {}
    for name in (*READOUTS, *(["own"] if model.token_readout is not None else [])):
        named[name] = probe.readout(name)
        bits[name] = probe.bits(name)
    if baseline is not None:
        digest = weights_hash(baseline.model)[:DIGEST_LENGTH]
        named["baseline"] = probe.baseline(baseline.model, baseline.blocks, digest)
        bits["baseline"] = probe.baseline_bits(baseline.model, baseline.blocks, digest)
    scores, bits = _aligned(named), _aligned(bits)
    draws, seed = scores["draws"], options.seed
    gap = Gap(
        measured_on={
            **measured_on, "blocks": draws.protocol["blocks"],
            "block_size": draws.protocol["block_size"], "positions": len(draws.offsets),
            **asdict(options),
        },
        patch_size=model.patch_size,
        scores={name: mean_of(found, seed) for name, found in scores.items()},
        losses=losses_of(probe, named.get("baseline")),
        joint=difference(scores["causal"], scores["independent"], seed),
        bits={name: mean_of(found, seed) for name, found in bits.items()},
        tokens_per_byte=tokens_per_byte(tokenizer, draws.text),
        slots={name: mean_of(probe.slots(name), seed) for name in ("draws", *READOUTS)},
        latent=store.values("latent", probe.latent),
    )  # fmt: skip
    store.finish(gap)
    return gap


def write_gap(gap: Gap, folder: Path) -> str:
    """Write report and figure to `folder`; returns the report."""
    report = to_markdown(gap)
    (folder / "report.md").write_text(report, encoding="utf-8")
    plot_gap(gap, folder / "report.png")
    return report


def _aligned(scores: dict[str, TextScores]) -> dict[str, TextScores]:
    """Each at the positions that all have."""
    return dict(zip(scores, common_positions(list(scores.values())), strict=True))
