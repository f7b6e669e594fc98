r"""After stage two: reinforcement learning of a CALM, without a likelihood.

    python -m calm.training.post_train --config demo --model_name_or_path runs/demo/calm \
        --reward regex:return --output_dir runs/demo/post

`calm post-train` is the same. ``torchrun -m`` instead of ``python -m`` trains on several devices.
The head learns, or with ``--method policy`` a density of its noise; all else stays as it is.
"""

from copy import deepcopy

from transformers import PreTrainedTokenizerBase

from calm.errors import UserError
from calm.memory import check_draws
from calm.models import EnergyTransformer
from calm.training import train_calm
from calm.training.flags.arguments import JobArguments
from calm.training.flags.recipe import Stage
from calm.training.job import run_stage
from calm.training.objectives.post_training import (
    PolicyObjective,
    PostTrainingArguments,
    PostTrainingObjective,
    TiltedObjective,
)
from calm.training.objectives.rewards import load_reward

__all__ = ["build_model", "learn_from", "main"]


def build_model(arguments: JobArguments, tokenizer: PreTrainedTokenizerBase) -> EnergyTransformer:
    """The CALM at ``model_name_or_path``, whose head, or policy, alone learns."""
    loaded = train_calm.build_model(arguments, tokenizer)
    model = train_calm.with_energy_head(loaded, arguments, use="be trained by rewards of its draws")
    training = arguments.training
    for flag in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(training, flag):
            raise UserError(
                f"{flag} must be false in this stage: an evaluation would compare a rounded head "
                "with the old one as it was; got True"
            )
    learn_from(model, arguments.options, tokenizer)
    chunks = arguments.batch_tokens // model.patch_size
    check_draws(model, "num_draws", arguments.options.num_draws, chunks)
    return model


def learn_from(
    model: EnergyTransformer, options: PostTrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> PostTrainingObjective:
    """Give `model` the objective; what learns alone has gradients.

    Args:
        model: as it is, the old model.
        options: the flags.
        tokenizer: of the model, for rewards of text.

    Raises:
        UserError: no such reward, or too few draws for it.
    """
    reward = load_reward(options.reward, tokenizer, options.reward_reads)
    least = reward.least_draws if options.method == "policy" else 2
    if options.num_draws < least:
        raise UserError(
            f"num_draws must be at least {least} for method {options.method} with the reward "
            f"{options.reward}, whose baseline needs other draws; got {options.num_draws}"
        )
    old_head = deepcopy(model.generative_head).requires_grad_(False).eval()
    is_policy = options.method == "policy"
    learning = model.add_noise_policy().noise_policy if is_policy else model.generative_head
    model.requires_grad_(False)
    learning.requires_grad_(True)
    objective = (PolicyObjective if is_policy else TiltedObjective)(options, reward, old_head)
    model.objective = objective
    return objective


def main(argv: list[str] | None = None) -> int:
    """Train the head or the policy; the exit status."""
    return run_stage(Stage.POST, build_model, argv)


if __name__ == "__main__":
    raise SystemExit(main())
