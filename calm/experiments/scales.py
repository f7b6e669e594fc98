"""How large experiments are: one table of presets for all of them.

A scale names the recipes of the reference models, how long each trains, what it is scored on, and
the values that each experiment's grid takes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from calm.errors import UserError
from calm.experiments.trained import Training
from calm.training.recipe import Stage, load_recipe

__all__ = ["SCALES", "Scale", "scale_named"]

Flags = Mapping[str, Any]


@dataclass(frozen=True)
class Scale:
    """Sizes and budgets of all experiments.

    Attributes:
        name: of the flag's value.
        about: what it is for, and how long it takes.
        recipes: of the reference model of each stage.
        common: flags of all trainings, those of the text among them.
        changes: flags of the reference training of a stage, on top of its recipe.
        grid: values that experiments vary, by name.
        blocks: held-out blocks that a model is scored on.
        draws: N of BrierLM.
        seeds: of the repetitions.
        needs_text: whether the user must name the text.
        devices: that share a step.
    """

    name: str
    about: str
    recipes: Mapping[Stage, str]
    common: Flags
    changes: Mapping[Stage, Flags]
    grid: Mapping[str, Sequence[Any]]
    blocks: int
    draws: int
    seeds: tuple[int, ...] = (1,)
    needs_text: bool = False
    devices: int = 1

    def autoencoder(self, seed: int = 1, **changes: Any) -> Training:
        """The reference autoencoder with `changes`."""
        return self._training(Stage.AUTOENCODER, seed, None).but(**changes)

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
    counts = zip(Stage, (autoencoder, calm, baseline), strict=True)
    return {stage: {"max_steps": count} for stage, count in counts}


def _recipes(autoencoder: str, calm: str, baseline: str) -> dict[Stage, str]:
    return dict(zip(Stage, (autoencoder, calm, baseline), strict=True))


_MUON_AND_ADAMW: Sequence[Any] = (
    ("Muon", {}),
    ("AdamW", {"muon_learning_rate": 0}),
)


def _width(width: int) -> dict[str, int]:
    return {"hidden_size": width, "intermediate_size": 8 * width // 3}


def _recipe(stage: Stage, name: str) -> dict[str, Any]:
    """Fields of the model of a recipe."""
    return load_recipe(name, stage)["config_overrides"]


# Name, fields of the CALM, fields of the baseline of about as many parameters.
_DESK_SIZES: Sequence[Any] = (
    ("small", _width(64), _width(64)),
    ("medium", {}, {}),
    ("large", _width(192), _width(192)),
)
_PAPER_SIZES: Sequence[Any] = tuple(
    (name, _recipe(Stage.CALM, calm), _recipe(Stage.BASELINE, baseline))
    for name, calm, baseline in (
        ("M", "calm-m", "baseline-s"),
        ("L", "calm-l", "baseline-m"),
        ("XL", "calm-xl", "baseline-l"),
    )
)


SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            name="tiny",
            about="minutes on one core: shows that the command runs",
            recipes=_recipes("tiny", "tiny", "tiny"),
            common={**_QUIET, **_UNSAVED, "logging_steps": 5},
            changes=_steps(20, 12, 12),
            grid={
                "curve_steps": (2,),
                "optimizers": (("AdamW", {}),),
                "budget_shares": (1.0,),
                "flow_steps": (1,),
                "diffusion_steps": (2,),
                "kl_weights": (1e-1,),
                "latent_sizes": (8,),
                "sizes": (("small", {}, {}),),
                "chunk_sizes": (2, 4),
                "budgets": ((1e8, ("small",)), (3e8, ("small",))),
                "checkpoint_steps": (6,),
                "reference_draws": (4,),
                "num_samples": (2, 4),
                "num_targets": (1, 4),
                "antithetic": (4,),
                "exponents": (0.5, 1.0),
            },
            blocks=6,
            draws=4,
        ),
        Scale(
            name="desk",
            about="two cores, at most three hours an experiment; the demo's sizes, bytes",
            recipes=_recipes("demo", "demo", "demo"),
            common={**_QUIET, **_UNSAVED, **_OWN_TEXT},
            changes=_steps(1500, 1000, 1000),
            grid={
                "curve_steps": (10,),
                "optimizers": _MUON_AND_ADAMW,
                "budget_shares": (0.5, 1.0),
                "flow_steps": (1, 2, 4),
                "diffusion_steps": (10, 25, 50),
                "kl_weights": (0, 1e-4, 1e-3, 1e-2, 1e-1),
                "latent_sizes": (8, 16, 64),
                "sizes": _DESK_SIZES,
                "chunk_sizes": (1, 2, 4, 8),
                "budgets": (
                    (5.3e12, ("small", "medium")),
                    (8e12, ("small", "medium")),
                    (1.2e13, ("medium", "large")),
                    (1.8e13, ("medium", "large")),
                ),
                "checkpoint_steps": (100,),
                "reference_draws": (4,),
                "num_samples": (2, 4, 8),
                "num_targets": (1, 16, 100),
                "antithetic": (16,),
                "exponents": (0.3, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 1.9),
            },
            blocks=160,
            draws=16,
            seeds=(1, 2),
        ),
        Scale(
            name="small",
            about="one GPU, ten minutes an experiment",
            recipes=_recipes("small", "small", "small"),
            common={**_QUIET, **_UNSAVED, **_OWN_TEXT, "bf16": True},
            changes=_steps(2000, 2000, 2000),
            grid={
                "curve_steps": (10,),
                "optimizers": (("AdamW", {}),),
                "budget_shares": (0.25, 0.5, 1.0),
                "flow_steps": (1, 2, 4),
                "diffusion_steps": (10, 25, 50),
                "kl_weights": (0, 1e-4, 1e-3, 1e-1),
                "latent_sizes": (16, 32, 128),
                "sizes": (("small", {}, {}),),
                "chunk_sizes": (1, 2, 4, 8),
                "budgets": ((1e15, ("small",)), (2e15, ("small",)), (4e15, ("small",))),
                "checkpoint_steps": (200,),
                "reference_draws": (8,),
                "num_samples": (2, 4, 8, 12),
                "num_targets": (1, 16, 100, 200),
                "antithetic": (16,),
                "exponents": (0.75, 1.0, 1.25, 1.5, 1.75, 1.9),
            },
            blocks=160,
            draws=16,
        ),
        Scale(
            name="paper",
            about="the published sizes and budgets, for a cluster; name the text and its tokenizer",
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
            grid={
                "curve_steps": (100,),
                "optimizers": (("AdamW", {}),),
                "budget_shares": (0.25, 0.5, 1.0),
                "flow_steps": (1, 2, 4),
                "diffusion_steps": (10, 25, 50),
                "kl_weights": (0, 1e-4, 1e-2, 1e-1),
                "latent_sizes": (32, 64, 256),
                "sizes": _PAPER_SIZES,
                "chunk_sizes": (1, 2, 4, 8),
                "budgets": (
                    (4e20, ("M",)), (8e20, ("M", "L")), (2e21, ("L", "XL")),
                ),
                "checkpoint_steps": (10000,),
                "reference_draws": (8,),
                "num_samples": (2, 4, 8, 12),
                "num_targets": (1, 16, 100, 200),
                "antithetic": (16,),
                "exponents": (0.75, 1.0, 1.25, 1.5, 1.75, 1.9),
            },
            blocks=10**9,
            draws=8,
            needs_text=True,
            devices=8,
        ),
    )
}  # fmt: skip


def scale_named(name: str) -> Scale:
    """The scale called `name`."""
    if name not in SCALES:
        raise UserError(f"--scale must be one of {', '.join(SCALES)}, got {name!r}")
    return SCALES[name]
