"""What a recipe, a YAML file or a folder describes, on the meta device: models and their runs."""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedModel

from calm.configuration import AutoencoderConfig, CALMConfig
from calm.data.tokenizer import BYTE_VOCAB_SIZE
from calm.errors import UserError
from calm.models import MODEL_CLASSES, Autoencoder, BaselineTransformer
from calm.models.loading import load_config, on_meta
from calm.ranges import Range, at_least, number
from calm.training.flags.config_overrides import build_config
from calm.training.flags.recipe import PRETRAINING, Recipe, Stage, load_recipe, recipe_stages
from calm.training.stages import STAGES

__all__ = ["Run", "count_parts", "described", "saved_model", "stages_of"]

PARTS = {  # of a model: the modules that belong to each
    "embedding": ("transformer.embed_tokens", "model.embed_tokens"),
    "compressor": ("embed_proj", "latent_proj"),
    "backbone": ("transformer.layers", "transformer.norm", "model.layers", "model.norm"),
    "head": ("generative_head", "mlp_generator"),
    "tempered head": ("tempered_head",),
    "readout": ("token_readout",),
    "output": ("lm_head",),
    "alignment": ("alignment",),
    "slot_mixing": ("encoder.mixing_layers", "decoder.mixing_layers"),
}


@dataclass(frozen=True)
class Run:
    """How a recipe trains.

    Attributes:
        block_size: tokens of a sequence.
        micro_batch: sequences that a GPU computes at once.
        accumulation: micro-batches of a step.
        steps: of the optimizer; None where the recipe does not say.
        is_bf16: whether matmuls run in bfloat16, under autocast.
        is_checkpointed: whether each layer of the backbone is computed again for its backward pass.
    """

    block_size: int
    micro_batch: int
    accumulation: int
    steps: int | None
    is_bf16: bool
    is_checkpointed: bool


def stages_of(name: str, vocab_size: int | None = None) -> dict[Stage, tuple[PreTrainedModel, Run]]:
    """Model and run of each stage of pre-training in the recipe or YAML file `name`.

    Args:
        name: of a recipe, or a path.
        vocab_size: entries of the tokenizer; None for those of the recipe's, else the published.
    """
    stages = [stage for stage in recipe_stages(name) if stage in PRETRAINING]
    recipes = {stage: load_recipe(name, stage) for stage in stages}
    vocab_size = vocab_size or _vocab_size(next(iter(recipes.values())))
    autoencoder = recipes.get(Stage.AUTOENCODER)
    return {
        stage: described(stage, recipe, autoencoder, name=name, vocab_size=vocab_size)
        for stage, recipe in recipes.items()
    }


def described(
    stage: Stage,
    recipe: Recipe,
    autoencoder: Recipe | None = None,
    *,
    name: str = "recipe",
    vocab_size: int | None = None,
) -> tuple[PreTrainedModel, Run]:
    """Model, on the meta device, and run that the flags of a stage describe.

    Args:
        stage: which one.
        recipe: its flags.
        autoencoder: flags of the autoencoder that a language model learns on.
        name: of the recipe, for errors.
        vocab_size: entries of the tokenizer; None for those of the recipe's, else the published.
    """
    vocab_size = vocab_size or _vocab_size(recipe)
    return _model(stage, recipe, autoencoder, vocab_size), _run(name, stage, recipe)


def saved_model(folder: Path, kind: str) -> PreTrainedModel:
    """The model in `folder`, of a kind that `calm` has."""
    classes: dict[str, tuple[Any, Any]] = {
        "autoencoder": (Autoencoder, AutoencoderConfig),
        "baseline": (BaselineTransformer, LlamaConfig),
        **{head: (model_class, CALMConfig) for head, model_class in MODEL_CLASSES.items()},
    }
    if kind not in classes:
        raise UserError(f"{folder} holds a {kind!r} model, which calm does not have")
    model_class, config_class = classes[kind]
    return on_meta(model_class, load_config(config_class, str(folder), "plan"))


def count_parts(model: PreTrainedModel) -> dict[str, int]:
    """Parameters of each part, and ``total``.

    The total of a language model excludes its autoencoder, counted in ``its_autoencoder``.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    inside = {name: size for name, size in sizes.items() if not name.startswith("ae_model.")}
    counts = {
        part: sum(size for name, size in inside.items() if name.startswith(prefixes))
        for part, prefixes in PARTS.items()
    }
    counts = {part: size for part, size in counts.items() if size}
    counts["total"] = sum(inside.values())
    if len(inside) < len(sizes):
        counts["its_autoencoder"] = sum(sizes.values()) - counts["total"]
    return counts


def _model(stage: Stage, recipe: Any, autoencoder: Any, vocab_size: int) -> PreTrainedModel:
    """The model of one stage; a language model takes K and latent size from its autoencoder."""
    overrides = dict(recipe.get("config_overrides", {}))
    head = overrides.pop("model_type", None) or recipe.get("model_type", "energy")
    if stage is Stage.BASELINE:
        extras = {"initializer": str, "embedding_std": float}
        config = build_config(LlamaConfig, overrides, extras=extras, vocab_size=vocab_size)
        return on_meta(BaselineTransformer, config)
    ae_overrides = (autoencoder or {}).get("config_overrides", {})
    ae_config = build_config(AutoencoderConfig, ae_overrides, vocab_size=vocab_size)
    if stage is Stage.AUTOENCODER:
        return _with_teacher(on_meta(Autoencoder, ae_config), recipe)
    shared = {key: getattr(ae_config, key) for key in ("vocab_size", "patch_size", "latent_size")}
    config = build_config(CALMConfig, overrides, ae_config=ae_config, head_type=head, **shared)
    return on_meta(MODEL_CLASSES[head], config)


def _with_teacher(model: Autoencoder, recipe: Any) -> Autoencoder:
    """The autoencoder with the teacher that the recipe names, if it trains with one."""
    folder = recipe.get("teacher_name_or_path")
    if model.config.alignment_weight and not folder:
        raise UserError(
            "alignment_weight needs teacher_name_or_path in the recipe too, a folder with the "
            "config.json of a token baseline: its operations are part of the training"
        )
    if folder:
        config = load_config(LlamaConfig, folder, "teacher_name_or_path")
        with torch.device("meta"):
            model.attach_teacher(BaselineTransformer(config))
    return model


def _run(name: str, stage: Stage, recipe: Any) -> Run:
    def read(flag: str, default: int, allowed: Range) -> int:
        try:
            return int(number(int, allowed)(recipe.get(flag, str(default))))
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            raise UserError(f"config: {name}: {flag}: {error}") from error

    def is_on(flag: str) -> bool:
        return str(recipe.get(flag, "false")).lower() in ("true", "yes", "1")

    steps, count = read("max_steps", -1, at_least(1, also=-1)), at_least(1)
    return Run(
        block_size=read("block_size", STAGES[stage].block_size, count),
        micro_batch=read("per_device_train_batch_size", 8, count),
        accumulation=read("gradient_accumulation_steps", 1, count),
        steps=None if steps < 0 else steps,
        is_bf16=is_on("bf16"),
        # transformers 5.20 and later have the second name, and the first for now
        is_checkpointed=is_on("gradient_checkpointing") or is_on("activation_checkpointing"),
    )


def _vocab_size(recipe: Any) -> int:
    """Vocabulary size of the tokenizer that the recipe names; else the published size."""
    name = recipe.get("tokenizer_name", "")
    if name == "bytes":
        return BYTE_VOCAB_SIZE
    trained = re.fullmatch(r"bpe:(\d+)", name)
    return int(trained.group(1)) if trained else AutoencoderConfig.vocab_size
