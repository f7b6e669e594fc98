r"""After stage two: a head that draws at low temperatures in one step.

    python -m calm.training.distill_temperature --config demo --model_name_or_path runs/demo/calm \
        --output_dir runs/demo/tempered

`calm distill-temperature` is the same. ``torchrun -m`` instead of ``python -m`` trains on several
devices. Everything but the new head stays as it is: T = 1 draws what it drew before.
"""

from transformers import PreTrainedTokenizerBase

from calm.models import EnergyTransformer
from calm.training import train_calm
from calm.training.flags.arguments import JobArguments
from calm.training.flags.recipe import Stage
from calm.training.job import run_stage
from calm.training.objectives.tempering import TemperatureObjective, TemperingArguments

__all__ = ["build_model", "main"]


def build_model(arguments: JobArguments, tokenizer: PreTrainedTokenizerBase) -> EnergyTransformer:
    """The CALM at ``model_name_or_path``, whose tempered head alone learns.

    A model that has such a head already goes on from it, in the range that the flags give.
    """
    loaded = train_calm.new_or_trained(arguments, tokenizer)
    model = train_calm.with_energy_head(loaded, arguments, use="learn temperatures")
    tempering: TemperingArguments = arguments.options
    head = model.add_tempered_head(tempering.bounds)
    model.requires_grad_(False)
    head.requires_grad_(True)
    model.objective = TemperatureObjective(tempering)
    return model


def main(argv: list[str] | None = None) -> int:
    """Train the head; the exit status."""
    return run_stage(Stage.TEMPERATURE, build_model, argv)


if __name__ == "__main__":
    raise SystemExit(main())
