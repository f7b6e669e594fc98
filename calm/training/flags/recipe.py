"""Recipes: flags in YAML, either shipped under a name or in a file of the user.

A recipe holds flags of one stage, or sections for several: ``common`` and the stages' names. It may
extend another one (``extends: <name or file beside it>``), whose entries it overrides.
``config_overrides`` may be a mapping and is merged entry by entry. A scalar gets the type of the
flag that it sets: ``3e-4`` is a number and ``eval_strategy: no`` a string. Flags on the command
line override the recipe.
"""

from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from calm.errors import UserError

__all__ = [
    "PRETRAINING",
    "Recipe",
    "Stage",
    "load_recipe",
    "merge",
    "recipe_arguments",
    "recipe_names",
    "recipe_stages",
    "recipe_words",
]

COMMON = "common"
SUFFIXES = (".yaml", ".yml")
# Flags that name a text: a dataset, or files.
TEXT_SOURCES = ({"dataset_name", "dataset_config_name"}, {"train_file", "validation_file"})


class Stage(StrEnum):
    """What is trained."""

    AUTOENCODER = "autoencoder"
    CALM = "calm"
    BASELINE = "baseline"
    TEMPERATURE = "temperature"  # the tempered head of a trained CALM
    POST = "post"  # a trained CALM, by rewards
    DISTILLATION = "distillation"  # a trained CALM, from another model's draws


SECTIONS = (COMMON, *Stage)
PRETRAINING = (Stage.AUTOENCODER, Stage.CALM, Stage.BASELINE)
Recipe = dict[str, Any]


def _folder() -> Path:
    return Path(str(resources.files("calm"))) / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(file.stem for file in _folder().glob("[!_]*.yaml"))


def _locate(name: str, beside: Path | None = None) -> Path:
    candidates = [Path(name), _folder() / f"{name}.yaml"]
    if beside is not None:
        candidates.insert(0, beside / name)
    for path in candidates:
        if path.is_file() and path.suffix in SUFFIXES:
            return path
    raise UserError(
        f"config: {name!r} is neither a YAML file nor a recipe; recipes: "
        + ", ".join(recipe_names())
    )


def _parse(path: Path) -> Recipe:
    """What a file holds, a mapping with names as keys."""
    try:
        # BaseLoader keeps scalars as strings: YAML 1.1 would read `no` as False. It makes strings,
        # lists and mappings, whatever tags a file carries.
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader) or {}
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, TypeError) as error:
        raise UserError(f"config: {path} is not valid YAML ({error})") from error
    except RecursionError:
        raise UserError(f"config: {path} is nested too deeply") from None
    if not isinstance(content, dict):
        raise UserError(
            f"config: {path} must hold `flag: value` lines, got {type(content).__name__}"
        )
    return content


def _read(path: Path, below: tuple[Path, ...] = ()) -> Recipe:
    """Sections of a file on top of those it extends; flags without a section are ``common``.

    Args:
        path: of the file.
        below: the files that extend it.
    """
    if path.resolve() in below:
        raise UserError(f"config: {path} extends itself: take `extends` out of one of the files")
    content = _parse(path)
    base = content.pop("extends", None)
    if not isinstance(base, str | None):
        raise UserError(
            f"config: {path}: extends must name a recipe or a file, got {type(base).__name__}"
        )
    flags = {key: value for key, value in content.items() if key not in SECTIONS}
    sections = {key: content[key] or {} for key in SECTIONS if key in content}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise UserError(f"config: {path}: section {name} must hold `flag: value` lines")
        _check_values(path, section)
    _check_values(path, flags)
    if flags:
        sections[COMMON] = merge(flags, sections.get(COMMON, {}))
    if not base:
        return sections
    return merge(_read(_locate(base, path.parent), (*below, path.resolve())), sections)


def _check_values(path: Path, flags: Recipe) -> None:
    """Each flag has one value, a list of values or a mapping to values; nothing deeper."""
    for name, value in flags.items():
        inner: Any = value.values() if isinstance(value, dict) else value
        parts = [inner] if isinstance(inner, str) else inner
        if not all(isinstance(part, str) for part in (name, *parts)):
            raise UserError(
                f"config: {path}: {name} must be a value, a list of values or `name: value` lines"
            )


def merge(base: Recipe, over: Recipe) -> Recipe:
    """Entries of `over` replace those of `base`; mappings are merged entry by entry."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def recipe_stages(name: str) -> list[Stage]:
    """Stages for which the recipe `name` has a section; all stages if it has no sections."""
    sections = _read(_locate(name))
    return [stage for stage in Stage if stage in sections] or list(Stage)


def load_recipe(name: str, stage: Stage) -> Recipe:
    """Flags of `stage` in the recipe called `name` or the YAML file at that path.

    Raises:
        UserError: no such recipe or file, not YAML, or no section for `stage`.
    """
    sections = _read(_locate(name))
    if stage not in recipe_stages(name):
        raise UserError(
            f"config: {name} has no stage {stage.value!r}; it has: {', '.join(recipe_stages(name))}"
        )
    return merge(sections.get(COMMON, {}), sections.get(stage, {}))


def recipe_arguments(recipe: Recipe) -> list[str]:
    """The recipe as command-line arguments; empty and ``null`` entries are skipped."""
    words: list[str] = []
    for key, value in recipe.items():
        if isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        elif isinstance(value, dict):
            words.append(f"--{key}=" + ",".join(f"{name}={entry}" for name, entry in value.items()))
        elif value not in ("", "null", "~"):
            words.append(f"--{key}={value}")
    return words


def recipe_words(name: str, stage: Stage, given: set[str]) -> list[str]:
    """The recipe's flags, without those that name its text if `given` flags name another text."""
    hub, files = TEXT_SOURCES
    dropped = (files if given & hub else set()) | (hub if given & files else set())
    recipe = load_recipe(name, stage)
    return recipe_arguments({flag: recipe[flag] for flag in recipe if flag not in dropped})
