"""How large experiments are: one table of presets for all of them.

A scale names the recipes of the reference models, how long each trains, what it is scored on, and
the values that each experiment's grid takes. A new scale is a new entry of `SCALES`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from calm.experiments.trained import Training
from calm.training.flags.recipe import PRETRAINING, Stage, load_recipe

__all__ = ["SCALES", "Budget", "Flags", "Grid", "Scale", "Size"]

Flags = Mapping[str, Any]


class Size(NamedTuple):
    """Fields of the configuration of a CALM, and of a baseline of about as many parameters."""

    name: str
    calm: Flags
    baseline: Flags


class Budget(NamedTuple):
    """Training FLOPs of a model, and the names of the sizes that are trained with them."""

    flops: float
    sizes: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """Values that experiments vary.

    Attributes:
        num_samples: N of the energy loss.
        num_targets: M of the energy loss, where targets are drawn.
        antithetic: M where they are drawn in pairs.
        exponents: of the energy loss.
        kl_weights: of the autoencoder, beside the reference's.
        latent_sizes: likewise.
        chunk_sizes: K.
        sizes: of the models, from small to large.
        budgets: of `scaling`, from small to large.
        budget_shares: of `heads`, of the reference CALM's training FLOPs; the last one is 1.
        sampling_steps: of `heads`, by head, from few to many, beside the published number.
        optimizers: of `start`, flags by name.
        reference_draws: N of `loss` where N is not varied.
        curve_steps: between two losses in the log of `start`.
        checkpoint_steps: between two checkpoints of `metric`.
    """

    num_samples: Sequence[int]
    num_targets: Sequence[int]
    antithetic: Sequence[int]
    exponents: Sequence[float]
    kl_weights: Sequence[float]
    latent_sizes: Sequence[int]
    chunk_sizes: Sequence[int]
    sizes: Sequence[Size]
    budgets: Sequence[Budget]
    budget_shares: Sequence[float]
    sampling_steps: Mapping[str, Sequence[int]]
    optimizers: Mapping[str, Flags]
    reference_draws: int
    curve_steps: int
    checkpoint_steps: int


@dataclass(frozen=True)
class Scale:
    """Sizes and budgets of all experiments.

    Attributes:
        name: of the flag's value.
        about: what it is for, and how long it takes.
        recipes: of the reference model of each stage.
        common: flags of all trainings, those of the text among them.
        changes: flags of the reference training of a stage, on top of its recipe.
        grid: values that experiments vary.
        blocks: held-out blocks that a model is scored on.
        draws: N of BrierLM.
        seeds: of the repetitions.
        needs_text: whether the user must name the text.
        devices: that share a step.
        caution: what readers of its reports must know.
    """

    name: str
    about: str
    recipes: Mapping[Stage, str]
    common: Flags
    changes: Mapping[Stage, Flags]
    grid: Grid
    blocks: int
    draws: int
    seeds: tuple[int, ...] = (1,)
    needs_text: bool = False
    devices: int = 1
    caution: str = ""

    def autoencoder(
        self, seed: int = 1, teacher: Training | None = None, **changes: Any
    ) -> Training:
        """The reference autoencoder with `changes`, aligned to `teacher` if they say so."""
        training = self._training(Stage.AUTOENCODER, seed, None).but(**changes)
        return replace(training, teacher=teacher)

    def calm(self, seed: int = 1, autoencoder: Training | None = None, **changes: Any) -> Training:
        """The reference CALM with `changes`, on `autoencoder` or the reference one.

        All seeds of a CALM share one autoencoder.
        """
        return self._training(Stage.CALM, seed, autoencoder or self.autoencoder()).but(**changes)

    def baseline(self, seed: int = 1, **changes: Any) -> Training:
        """The reference token baseline with `changes`."""
        return self._training(Stage.BASELINE, seed, None).but(**changes)

    def flops(self, training: Training) -> float:
        """Floating-point operations of all steps of `training`."""
        return int(training.flags["max_steps"]) * training.flops_per_step(self.devices)

    def at_budget(self, training: Training, flops: float) -> Training:
        """`training` with as many steps as `flops` operations allow."""
        return training.but(max_steps=max(1, round(flops / training.flops_per_step(self.devices))))

    def with_flags(self, **flags: Any) -> "Scale":
        """The same scale with further flags of all trainings, as for another text."""
        return replace(self, common={**self.common, **flags})

    def _training(self, stage: Stage, seed: int, autoencoder: Training | None) -> Training:
        flags = {**self.common, **self.changes[stage], "seed": seed}
        return Training(stage, self.recipes[stage], flags, autoencoder)


# Flags that every training of an experiment has.
_QUIET: Flags = {
    "do_eval": False, "eval_strategy": "no", "report_to": "none", "max_train_seconds": 0,
}  # fmt: skip
_UNSAVED = {"save_strategy": "no", "disable_tqdm": True}
_OWN_TEXT = {"dataset_name": "embedded:packages", "validation_split_percentage": 2}


def _steps(autoencoder: int, calm: int, baseline: int) -> dict[Stage, Flags]:
    counts = zip(PRETRAINING, (autoencoder, calm, baseline), strict=True)
    return {stage: {"max_steps": count} for stage, count in counts}


def _without_readout(changes: dict[Stage, Flags]) -> dict[Stage, Flags]:
    """`changes`, and a CALM without what docs/recipe.md adds, which experiments vary."""
    published = {"beta": 1, "token_loss_weight": 0, "token_readout": "independent",
                 "keep_token_readout": False}  # fmt: skip
    return {**changes, Stage.CALM: {**changes[Stage.CALM], "config_overrides": published}}


def _recipes(autoencoder: str, calm: str, baseline: str) -> dict[Stage, str]:
    return dict(zip(PRETRAINING, (autoencoder, calm, baseline), strict=True))


def _width(width: int) -> Flags:
    return {"hidden_size": width, "intermediate_size": 8 * width // 3}


def _of_recipes(name: str, calm: str, baseline: str) -> Size:
    """A size with the fields of two recipes."""
    return Size(
        name,
        load_recipe(calm, Stage.CALM)["config_overrides"],
        load_recipe(baseline, Stage.BASELINE)["config_overrides"],
    )


_ONE_SIZE = (Size("small", {}, {}),)
_ADAMW: Mapping[str, Flags] = {"AdamW": {}}

_TINY = Scale(
    name="tiny",
    about="minutes on one core: shows that the command runs",
    caution="**This scale shows that the command runs. Its models have hardly learned anything: "
    "numbers and verdicts here say nothing about the methods.**",
    recipes=_recipes("tiny", "tiny", "tiny"),
    common={**_QUIET, **_UNSAVED, "logging_steps": 5},
    changes=_without_readout(_steps(20, 12, 12)),
    grid=Grid(
        num_samples=(2, 4),
        num_targets=(1, 4),
        antithetic=(4,),
        exponents=(0.5, 1.0),
        kl_weights=(1e-1,),
        latent_sizes=(8,),
        chunk_sizes=(2, 4),
        sizes=_ONE_SIZE,
        budgets=(Budget(1e8, ("small",)), Budget(3e8, ("small",))),
        budget_shares=(1.0,),
        sampling_steps={"diffusion": (2,), "flow": (1,)},
        optimizers=_ADAMW,
        reference_draws=4,
        curve_steps=2,
        checkpoint_steps=6,
    ),
    blocks=6,
    draws=4,
)

_DESK = Scale(
    name="desk",
    about="two cores, at most three hours an experiment; the demo's sizes, bytes",
    recipes=_recipes("desk", "desk", "desk"),
    common={**_QUIET, **_UNSAVED, **_OWN_TEXT},
    changes=_steps(1500, 1000, 1000),
    grid=Grid(
        num_samples=(2, 4, 8),
        num_targets=(1, 16, 100),
        antithetic=(16,),
        exponents=(0.3, 0.5, 1.0, 1.5, 1.9),
        kl_weights=(0, 1e-4, 1e-2, 1e-1),
        latent_sizes=(16, 64),
        chunk_sizes=(1, 2, 4, 8),
        sizes=(
            Size("small", _width(64), _width(64)),
            Size("medium", {}, {}),
            Size("large", _width(192), _width(192)),
        ),
        budgets=(
            Budget(3.2e12, ("small", "medium")),
            Budget(4.5e12, ("small", "medium")),
            Budget(6.4e12, ("medium", "large")),
            Budget(9e12, ("medium", "large")),
        ),
        budget_shares=(0.5, 1.0),
        sampling_steps={"diffusion": (10, 25, 50), "flow": (1, 2, 4)},
        optimizers={"Muon": {}, "AdamW": {"muon_learning_rate": 0}},
        reference_draws=4,
        curve_steps=10,
        checkpoint_steps=100,
    ),
    blocks=160,
    draws=16,
    seeds=(1, 2),
)

_DEMO = replace(
    _DESK,
    name="demo",
    about="as desk, with the text of `calm demo` and 1,362 steps",
    common={
        **_QUIET, **_UNSAVED, "dataset_name": "embedded:docstrings",
        "validation_split_percentage": 8,
    },
    changes=_steps(1500, 1362, 1362),
)  # fmt: skip

_SMALL = Scale(
    name="small",
    about="one GPU, ten minutes an experiment",
    recipes=_recipes("small", "small", "small"),
    common={**_QUIET, **_UNSAVED, **_OWN_TEXT, "bf16": True},
    changes=_without_readout(_steps(2000, 2000, 2000)),
    grid=Grid(
        num_samples=(2, 4, 8, 12),
        num_targets=(1, 16, 100, 200),
        antithetic=(16,),
        exponents=(0.75, 1.0, 1.25, 1.5, 1.75, 1.9),
        kl_weights=(0, 1e-4, 1e-3, 1e-1),
        latent_sizes=(16, 32, 128),
        chunk_sizes=(1, 2, 4, 8),
        sizes=_ONE_SIZE,
        budgets=(Budget(1e15, ("small",)), Budget(2e15, ("small",)), Budget(4e15, ("small",))),
        budget_shares=(0.25, 0.5, 1.0),
        sampling_steps={"diffusion": (10, 25, 50), "flow": (1, 2, 4)},
        optimizers=_ADAMW,
        reference_draws=8,
        curve_steps=10,
        checkpoint_steps=200,
    ),
    blocks=160,
    draws=16,
)

_PAPER = Scale(
    name="paper",
    about="the published sizes and budgets, for a cluster; name a prepared text and its tokenizer",
    recipes=_recipes("autoencoder", "calm-m", "baseline-s"),
    common=_QUIET,
    changes={
        Stage.AUTOENCODER: {},
        # The ablations' size and steps (paper, sections 7.3 and 7.4).
        Stage.CALM: {
            "max_steps": 50000,
            "config_overrides": {
                "num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 2048,
                "num_mlp_layers": 3,
            },
        },
        Stage.BASELINE: {},
    },
    grid=Grid(
        num_samples=(2, 4, 8, 12),
        num_targets=(1, 16, 100, 200),
        antithetic=(16,),
        exponents=(0.75, 1.0, 1.25, 1.5, 1.75, 1.9),
        kl_weights=(0, 1e-4, 1e-2, 1e-1),
        latent_sizes=(32, 64, 256),
        chunk_sizes=(1, 2, 4, 8),
        sizes=(
            _of_recipes("M", "calm-m", "baseline-s"),
            _of_recipes("L", "calm-l", "baseline-m"),
            _of_recipes("XL", "calm-xl", "baseline-l"),
        ),
        budgets=(Budget(4e20, ("M",)), Budget(8e20, ("M", "L")), Budget(2e21, ("L", "XL"))),
        budget_shares=(0.25, 0.5, 1.0),
        sampling_steps={"diffusion": (10, 25, 50), "flow": (1, 2, 4)},
        optimizers=_ADAMW,
        reference_draws=8,
        curve_steps=100,
        checkpoint_steps=10000,
    ),
    blocks=10**9,
    draws=8,
    needs_text=True,
    devices=8,
)  # fmt: skip

SCALES = {scale.name: scale for scale in (_TINY, _DEMO, _DESK, _SMALL, _PAPER)}
