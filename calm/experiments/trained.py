"""Models of experiments: what decides their weights, and training them once."""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calm.configuration import CALMConfig
from calm.data.tokenizer import load_tokenizer
from calm.errors import UserError
from calm.flops import Flops, flops_of
from calm.integrity import find_damage
from calm.models import MODEL_CLASSES, Autoencoder, BaselineTransformer
from calm.models.loading import load_checked, load_config
from calm.plan import described
from calm.training import train_ar, train_autoencoder, train_calm
from calm.training.flags.arguments import parse_arguments
from calm.training.flags.recipe import Stage, load_recipe, merge, recipe_arguments
from calm.training.job import run_job

__all__ = ["BUILDERS", "Trained", "Training", "digest", "ensure_trained"]

BUILDERS = {
    Stage.AUTOENCODER: train_autoencoder.build_model,
    Stage.CALM: train_calm.build_model,
    Stage.BASELINE: train_ar.build_model,
}
KEY_LENGTH = 12
LOG = "training.log"


@dataclass(frozen=True, eq=False)
class Training:
    """A model to train. Equal keys mean equal weights.

    Attributes:
        stage: which of the three training programs.
        recipe: that gives its flags.
        changes: flags on top of it; ``config_overrides`` is merged entry by entry.
        autoencoder: that a CALM learns on.
        teacher: token baseline that an autoencoder is aligned to.
    """

    stage: Stage
    recipe: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    autoencoder: "Training | None" = None
    teacher: "Training | None" = None

    @cached_property
    def flags(self) -> dict[str, Any]:
        """The recipe's flags with the changes; every value is text, as in a recipe."""
        return merge(_recipe(self.recipe, self.stage), _as_text(self.changes))

    @cached_property
    def key(self) -> str:
        """Hash of everything that decides the weights."""
        before = self.autoencoder.key if self.autoencoder else None
        taught = [self.teacher.key] if self.teacher else []
        return digest([self.stage.value, self.flags, before, *taught])

    @property
    def needed(self) -> "list[Training]":
        """The models that it learns from, each after those that it needs itself."""
        direct = [training for training in (self.teacher, self.autoencoder) if training is not None]
        return [each for training in direct for each in (*training.needed, training)]

    def but(self, **changes: Any) -> "Training":
        """The same training with further flags."""
        merged = merge(_as_text(self.changes), _as_text(changes))
        return replace(self, changes=merged)

    def flops_per_step(self, devices: int = 1) -> float:
        """Floating-point operations of a step on `devices` of them; see `calm.flops`."""
        before = self.autoencoder.flags if self.autoencoder else None
        texts = (json.dumps(_sizes(flags), sort_keys=True) for flags in (self.flags, before))
        return devices * _flops_per_step(self.stage, *texts)

    def words(self, models: Path) -> list[str]:
        """The command line that trains it into its folder under `models`."""
        words = [*recipe_arguments(self.flags), f"--output_dir={models / self.key}"]
        if self.autoencoder:
            words.append(f"--ae_name_or_path={models / self.autoencoder.key}")
        if self.teacher:
            words.append(f"--teacher_name_or_path={models / self.teacher.key}")
        return words


@dataclass(frozen=True)
class Trained:
    """A trained model in its folder."""

    training: Training
    folder: Path

    def load(self, checkpoint: int | None = None) -> PreTrainedModel:
        """The model, in evaluation mode, on a GPU if there is one.

        Args:
            checkpoint: that of this step instead of the final weights.
        """
        folder = self.folder if checkpoint is None else self.folder / f"checkpoint-{checkpoint}"
        model_class: Any = {
            Stage.AUTOENCODER: Autoencoder, Stage.BASELINE: BaselineTransformer,
        }.get(self.training.stage)  # fmt: skip
        if model_class is None:
            config = load_config(CALMConfig, str(folder), "experiment")
            model_class = MODEL_CLASSES[str(config.head_type)]
        model: Any = load_checked(model_class, str(folder), "experiment")
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that was saved with it."""
        return load_tokenizer(str(self.folder), argument="experiment")

    def protocol(self) -> dict[str, Any]:
        """What training recorded beside the weights."""
        return json.loads((self.folder / "protocol.json").read_text(encoding="utf-8"))

    def flops(self, model: PreTrainedModel) -> Flops:
        """Operations of `model`, which `load` gave, in a block of its training."""
        context = int(self.training.flags["block_size"]) // getattr(model, "patch_size", 1)
        return flops_of(model, context)

    def log(self) -> list[dict[str, float]]:
        """The training log: ``step``, ``loss``, and what else was logged."""
        state = json.loads((self.folder / "trainer_state.json").read_text(encoding="utf-8"))
        return [entry for entry in state["log_history"] if "loss" in entry]


def ensure_trained(training: Training, models: Path) -> Trained:
    """Train what is not in its folder under `models` yet, what it needs first.

    A run that was interrupted goes on from its last checkpoint if its recipe saves any. A model
    trained elsewhere by ``words`` is taken as it is.
    """
    for before in training.needed:
        ensure_trained(before, models)
    folder = models / training.key
    if not (folder / "model.safetensors").is_file() or find_damage(folder) is not None:
        _train(training, models, folder)
    return Trained(training, folder)


def _train(training: Training, models: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    words = training.words(models)
    if not torch.cuda.is_available():
        words.append("--use_cpu=true")
    try:
        with (folder / LOG).open("w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            run_job(parse_arguments(words, training.stage), BUILDERS[training.stage])
    except UserError as error:
        raise UserError(f"{error} (while training {training.stage} {training.key})") from error


def _sizes(flags: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Flags without those that repetitions and budgets change."""
    if flags is None:
        return None
    return {name: value for name, value in flags.items() if name not in ("seed", "max_steps")}


@cache  # a grid asks for the same recipe, and the same model, again and again
def _recipe(name: str, stage: Stage) -> dict[str, Any]:
    return load_recipe(name, stage)


@cache
def _flops_per_step(stage: Stage, flags: str, autoencoder: str) -> float:
    """Of the model that flags, as JSON, describe."""
    model, run = described(stage, json.loads(flags), json.loads(autoencoder))
    context = run.block_size // getattr(model, "patch_size", 1)
    return flops_of(model, context).training() * run.block_size * run.micro_batch * run.accumulation


def _as_text(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags as a recipe has them: text, lists of text, or mappings to text."""

    def text(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: text(entry) for name, entry in value.items()}
        return str(value).lower() if isinstance(value, bool) else str(value)

    return {name: text(value) for name, value in flags.items()}


def digest(parts: Any) -> str:
    """Hash of what JSON can hold."""
    canonical = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:KEY_LENGTH]
