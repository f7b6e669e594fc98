"""What is measured of a trained model: the functions that cells name."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from calm.data.embedded import PREFIX, embedded_stamp
from calm.data.options import CorpusOptions
from calm.evaluation.measures import TextMeasures, measure_text
from calm.evaluation.protocol import summarise
from calm.evaluation.readout_bits import readout_bits
from calm.evaluation.scores import TextScores, score_text
from calm.evaluation.text import scored_blocks
from calm.experiments.latent_code import latent_code
from calm.experiments.latent_space import latent_noise, latent_quality, unconditional_energy
from calm.experiments.scales import Scale
from calm.experiments.trained import Trained
from calm.models import BaselineTransformer

__all__ = ["MEASURES", "Measured", "Texts", "cost_of"]

HELD_OUT, TEST = "held-out", "test"
NOISE = 0.3  # added to latents, in units of their spread; one of `NOISE_SIZES`
DIGITS = 5  # of sums that are kept for comparisons


@dataclass(frozen=True)
class Measured:
    """What a measure returns; fields as in `calm.experiments.experiment.Result`."""

    values: dict[str, Any]
    groups: dict[str, list[list[float]]] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)


class Texts:
    """The texts that models are scored on: what training holds out, and a test file.

    Args:
        training: flags that name the training text, as a recipe has them.
        test_file: further text, all of which counts; None for none.
        corpora: embedded corpora to score on as well, by the name of the text.
    """

    def __init__(
        self,
        training: Mapping[str, Any],
        test_file: str | None = None,
        corpora: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        names = ("dataset_name", "train_file", "validation_file")
        options: Any = {name: str(training[name]) for name in names if training.get(name)}
        self.percentage = float(training.get("validation_split_percentage", 5))
        self.options = {
            HELD_OUT: CorpusOptions(**options, validation_split_percentage=self.percentage)
        }
        for name, corpus in corpora.items():
            self.options[name] = CorpusOptions(dataset_name=corpus, validation_split_percentage=0)
        if test_file:
            self.options[TEST] = CorpusOptions(train_file=test_file, validation_split_percentage=0)

    def describe(self) -> dict[str, str]:
        """Name of each text, for the record: files without their folders."""
        return {
            name: ", ".join(Path(str(source)).name for source in
                            (text.dataset_name, text.train_file, text.validation_file) if source)
            for name, text in self.options.items()
        }  # fmt: skip

    def stamps(self) -> dict[str, str]:
        """What changes with each embedded text: it is read from what is installed."""
        return {
            name: embedded_stamp(text.dataset_name)
            for name, text in self.options.items()
            if text.dataset_name and text.dataset_name.startswith(PREFIX)
        }

    def blocks(self, name: str, trained: Trained, model: PreTrainedModel, limit: int) -> Any:
        """The first `limit` blocks of a text, as `model` reads them."""
        blocks, _ = scored_blocks(
            self.options[name], model, trained.tokenizer(),
            block_size=int(trained.training.flags["block_size"]), max_blocks=limit,
        )  # fmt: skip
        return blocks


def cost_of(trained: Trained, checkpoint: int | None = None) -> dict[str, Any]:
    """Parameters and operations of a model (see `calm.flops`), and the hash of its text.

    Args:
        trained: the model.
        checkpoint: step of the weights that are meant; None for the final ones.
    """
    model, protocol = trained.load(), trained.protocol()
    settings = protocol["training"]
    steps = checkpoint or settings["max_steps"]
    batch = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    tokens = steps * batch * settings["world_size"] * protocol["block_size"]
    # By the flags: a readout that trained with the model may not be saved with it.
    per_step = trained.training.flops_per_step(settings["world_size"])
    learned = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return {
        "parameters": learned,
        "training_tokens": tokens,
        "training_flops": steps * per_step,
        "inference_flops": trained.flops(model).inference(),
        "train_data": (protocol["train"] or {}).get("data_hash"),
    }


def language_model(
    trained: Trained,
    texts: Texts,
    scale: Scale,
    *,
    checkpoint: int | None = None,
    sampling: Mapping[str, Any] = MappingProxyType({}),
    method: str = "direct",
    multiples_of: int = 1,
) -> Measured:
    """BrierLM and its parts on each text, and `measure_text`: the model's own loss and more.

    Args:
        trained: a CALM or the baseline.
        texts: to score.
        scale: how many blocks and draws.
        checkpoint: step of the weights; None for the final ones.
        sampling: fields of the configuration that sampling alone reads, such as `sampling_steps`.
        method: what draws, as `score_text` has it.
        multiples_of: n-grams start at multiples of this many tokens of the text.
    """
    model = trained.load(checkpoint)
    measured = Measured(values={}, curve=trained.log())
    if sampling:
        for field_name, value in sampling.items():
            setattr(model.config, field_name, value)
        measured.values["inference_flops"] = trained.flops(model).inference()
    if method == "readout":
        calm: Any = trained.flops(model)
        measured.values["inference_flops"] = calm.inference_by_readout()
    for name in texts.options:
        blocks = texts.blocks(name, trained, model, scale.blocks)
        _add_brier(measured, name, model, blocks, scale.draws, method, multiples_of)
        if method == "readout":
            _add_bits(measured, name, model, blocks)
        else:
            _add_diagnostics(measured, name, model, blocks)
    return measured


def latent_space(trained: Trained, texts: Texts, scale: Scale) -> Measured:
    """`language_model`, and how good the latent space is that it was trained in.

    The curve is the accuracy of reconstruction over the noise added to latents of held-out text.
    ``noisy`` values are with `NOISE` added, those of Brier-1 to the head's draws.
    """
    measured = language_model(trained, texts, scale)
    model: Any = trained.load()
    for name in texts.options:
        blocks = texts.blocks(name, trained, model, scale.blocks)
        found = latent_quality(model, blocks)
        with latent_noise(model, NOISE * found.spread):
            noisy = score_text(model, blocks, num_samples=scale.draws, skip_repeats=True)
        values = {
            "reconstruction_noisy": found.accuracy[NOISE],
            "posterior_std": found.posterior_std,
            "brier1_noisy": summarise(noisy).brier["brier1"],
        }
        measured.values.update({f"{name}/{key}": value for key, value in values.items()})
        if name == HELD_OUT:
            measured.curve[:] = [{"noise": n, "accuracy": a} for n, a in found.accuracy.items()]
    return measured


def latent_structure(trained: Trained, texts: Texts, scale: Scale) -> Measured:
    """`latent_space`, and what kind of code the latents are (`calm.experiments.latent_code`).

    ``additivity``, None where the text is too short; ``changed_token``, the distance that one
    changed token moves the mean, over the noise of a drawn latent; ``neighbours``, the distance of
    chunks that follow each other, over that of chunks from different places.
    """
    measured = latent_space(trained, texts, scale)
    model: Any = trained.load()
    for name in texts.options:
        code = latent_code(model, texts.blocks(name, trained, model, scale.blocks))
        values = {
            "additivity": code.additivity,
            "changed_token": code.changed_token / code.noise,
            "neighbours": code.neighbours / code.others,
        }
        measured.values.update({f"{name}/{key}": value for key, value in values.items()})
    return measured


def _add_brier(
    measured: Measured, text: str, model: Any, blocks: Any, draws: int, method: str,
    multiples_of: int,
) -> None:  # fmt: skip
    scores = score_text(model, blocks, num_samples=draws, method=method, skip_repeats=True)
    if multiples_of > 1:
        scores = scores.starting_at_multiples_of(multiples_of)
    measured.values.update(_brier_values(text, scores))
    measured.groups[f"{text}/brier"] = _rows(*scores.grouped(blocks.block_size))


def _add_diagnostics(measured: Measured, text: str, model: Any, blocks: Any) -> None:
    """What `measure_text` says, and what a model without context could reach."""
    found = measure_text(model, blocks)
    values = found.values()
    if isinstance(model, BaselineTransformer):
        values["bits_per_token"] = values["cross_entropy"] / math.log(2)
    else:
        values["unconditional"] = unconditional_energy(model, blocks)
        energy = found.scores.names.index("energy")
        sums, counts = found.scores.grouped(blocks.block_size)
        measured.groups[f"{text}/energy"] = _rows(sums[:, energy : energy + 1], counts)
    measured.values.update({f"{text}/{name}": value for name, value in values.items()})


def _add_bits(measured: Measured, text: str, model: Any, blocks: Any) -> None:
    """How likely a readout finds the text; the head.s energy would not be that of its draws."""
    found = TextMeasures(readout_bits(model, model.slot_readout(), blocks)).values()
    measured.values[f"{text}/bits_per_token"] = found["bits"] / model.patch_size


def _brier_values(text: str, scores: TextScores) -> dict[str, Any]:
    found = summarise(scores)
    values = {"brier_lm": found.brier_lm, **found.brier}
    if found.brier_lm_interval:
        values["brier_lm_low"], values["brier_lm_high"] = found.brier_lm_interval
    values |= {f"{order}_se": error for order, error in (found.standard_errors or {}).items()}
    return {f"{text}/{name}": value for name, value in values.items()}


def _rows(sums: Tensor, counts: Tensor) -> list[list[float]]:
    """``[sum, ..., count]`` of each group, rounded."""
    pairs = zip(sums.tolist(), counts.tolist(), strict=True)
    return [[*(round(value, DIGITS) for value in row), count] for row, count in pairs]


Measure = Callable[..., Measured]
MEASURES: dict[str, Measure] = {
    function.__name__: function for function in (language_model, latent_space, latent_structure)
}
