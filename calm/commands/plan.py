"""`calm plan`: the number of parameters of a recipe or a checkpoint, part by part."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from calm.commands.model_flags import model_kind, read_config
from calm.errors import UserError
from calm.ranges import at_least, number

__all__ = ["EXAMPLES", "add_arguments", "count_parts", "plan_of", "run"]

EXAMPLES = """\
  calm plan                       every recipe, one line each
  calm plan calm-m                part by part
  calm plan calm-m calm-l --json
  calm plan runs/demo/calm        a checkpoint, or a YAML file of your own

The autoencoder of a language model is counted separately, as in the paper's table 1.
"""

PARTS = {  # of a language model: the modules that belong to each
    "embedding": ("transformer.embed_tokens", "model.embed_tokens"),
    "compressor": ("embed_proj", "latent_proj"),
    "backbone": ("transformer.layers", "transformer.norm", "model.layers", "model.norm"),
    "head": ("generative_head", "mlp_generator"),
    "output": ("lm_head",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the subcommand."""
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="recipe, YAML file or folder of a saved model"
    )
    parser.add_argument(
        "--vocab-size",
        type=number(int, at_least(1)),
        metavar="V",
        help="entries of the tokenizer (default: what the recipe's tokenizer has, else 128256)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the counts."""
    from calm.training.recipe import recipe_names

    plans = {name: plan_of(name, args.vocab_size) for name in args.names or recipe_names()}
    if args.json:
        print(json.dumps(plans, indent=2))
        return 0
    for name, stages in plans.items():
        for stage, counts in stages.items():
            print(_line(name, stage, counts) if not args.names else _detail(name, stage, counts))
    return 0


def plan_of(name: str, vocab_size: int | None = None) -> dict[str, dict[str, int]]:
    """Counts of each stage of the recipe, YAML file or model folder `name`.

    Returns: for each stage the count of each part, and ``total``. The total of a language model
        excludes its autoencoder, which is counted in ``its_autoencoder``.
    """
    if Path(name).is_dir():
        config = read_config(Path(name))
        return {model_kind(config): _count_checkpoint(Path(name), model_kind(config))}
    from calm.training.recipe import Stage, load_recipe, recipe_stages

    recipes = {stage: load_recipe(name, stage) for stage in recipe_stages(name)}
    vocab_size = vocab_size or _vocab_size(next(iter(recipes.values())))
    autoencoder = recipes.get(Stage.AUTOENCODER)
    return {
        stage.value: _count_recipe(stage, recipe, autoencoder, vocab_size)
        for stage, recipe in recipes.items()
    }


def _count_recipe(stage: Any, recipe: Any, autoencoder: Any, vocab_size: int) -> dict[str, int]:
    """Counts of one stage; a language model takes K and latent size from its autoencoder."""
    from transformers import LlamaConfig

    from calm.configuration import AutoencoderConfig, CALMConfig
    from calm.models import MODEL_CLASSES, Autoencoder, BaselineTransformer
    from calm.training.config_overrides import build_config
    from calm.training.recipe import Stage

    overrides = dict(recipe.get("config_overrides", {}))
    head = overrides.pop("model_type", None) or recipe.get("model_type", "energy")
    if stage is Stage.BASELINE:
        extras = {"initializer": str, "embedding_std": float}
        config = build_config(LlamaConfig, overrides, extras=extras, vocab_size=vocab_size)
        return count_parts(BaselineTransformer, config)
    ae_overrides = (autoencoder or {}).get("config_overrides", {})
    ae_config = build_config(AutoencoderConfig, ae_overrides, vocab_size=vocab_size)
    if stage is Stage.AUTOENCODER:
        return count_parts(Autoencoder, ae_config)
    shared = {key: getattr(ae_config, key) for key in ("vocab_size", "patch_size", "latent_size")}
    config = build_config(CALMConfig, overrides, ae_config=ae_config, head_type=head, **shared)
    return count_parts(MODEL_CLASSES[head], config)


def _count_checkpoint(folder: Path, kind: str) -> dict[str, int]:
    from transformers import LlamaConfig

    from calm.configuration import AutoencoderConfig, CALMConfig
    from calm.models import MODEL_CLASSES, Autoencoder, BaselineTransformer
    from calm.models.loading import load_config

    classes: dict[str, tuple[Any, Any]] = {
        "autoencoder": (Autoencoder, AutoencoderConfig),
        "baseline": (BaselineTransformer, LlamaConfig),
        **{head: (model_class, CALMConfig) for head, model_class in MODEL_CLASSES.items()},
    }
    if kind not in classes:
        raise UserError(f"{folder} holds a {kind!r} model, which calm does not have")
    model_class, config_class = classes[kind]
    return count_parts(model_class, load_config(config_class, str(folder), "plan"))


def count_parts(model_class: Any, config: Any) -> dict[str, int]:
    """Parameters of a model, part by part, without allocating any."""
    from calm.models.loading import on_meta

    model = on_meta(model_class, config)
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


def _vocab_size(recipe: Any) -> int:
    """Vocabulary size of the tokenizer that the recipe names; else the published size."""
    from calm.configuration import AutoencoderConfig
    from calm.data.tokenizer import BYTE_VOCAB_SIZE

    name = recipe.get("tokenizer_name", "")
    if name == "bytes":
        return BYTE_VOCAB_SIZE
    trained = re.fullmatch(r"bpe:(\d+)", name)
    return int(trained.group(1)) if trained else AutoencoderConfig.vocab_size


def _line(name: str, stage: str, counts: dict[str, int]) -> str:
    return f"{name:18} {stage:12} {counts['total']:>16,}  {counts['total'] / 1e6:>9.1f}M"


def _detail(name: str, stage: str, counts: dict[str, int]) -> str:
    rows = [f"{name} ({stage})"]
    for part, size in counts.items():
        label = part.replace("_", " ")
        rows.append(f"  {label:16} {size:>16,}  {size / 1e6:>9.1f}M")
    return "\n".join(rows)
