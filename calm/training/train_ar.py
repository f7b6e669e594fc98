r"""The token-by-token baseline: the same backbone, one token per step, cross-entropy.

    python -m calm.training.train_ar --config baseline-s --train_file runs/pile

`calm train-ar` is the same. ``torchrun -m`` instead of ``python -m`` trains on several devices.
"""

from typing import Literal

from transformers import LlamaConfig, PreTrainedTokenizerBase

from calm.data.encoding import vocabulary_size
from calm.models import BaselineTransformer
from calm.training.building import check_vocabulary, check_weights, load_pretrained, new_config
from calm.training.flags.arguments import JobArguments
from calm.training.flags.recipe import Stage
from calm.training.job import run_stage

__all__ = ["build_model", "main"]

# What BaselineTransformer reads from a LlamaConfig beyond its own fields.
EXTRAS = {"rope_theta": float, "initializer": Literal["normal", "fan_in"], "embedding_std": float}


def build_model(arguments: JobArguments, tokenizer: PreTrainedTokenizerBase) -> BaselineTransformer:
    """A new baseline for `tokenizer`, or the one at ``model_name_or_path``."""
    model = arguments.model
    if model.model_name_or_path:
        name = model.model_name_or_path
        loaded = load_pretrained(BaselineTransformer, name, model, "model_name_or_path")
        check_vocabulary(loaded.config.vocab_size, tokenizer, "the baseline")
        return loaded
    config = new_config(
        LlamaConfig, model, tokenizer, EXTRAS, vocab_size=vocabulary_size(tokenizer)
    )
    check_vocabulary(config.vocab_size, tokenizer, "the baseline")
    check_weights(BaselineTransformer, config)
    return BaselineTransformer(config)


def main(argv: list[str] | None = None) -> int:
    """Train a baseline; the exit status."""
    return run_stage(Stage.BASELINE, build_model, argv)


if __name__ == "__main__":
    raise SystemExit(main())
