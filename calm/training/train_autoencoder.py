r"""Stage one: the autoencoder.

    python -m calm.training.train_autoencoder --config autoencoder --train_file 'pile/*.jsonl' \
        --output_dir runs/ae

`calm train-ae` is the same. ``torchrun -m`` instead of ``python -m`` trains on several devices.
"""

from transformers import PreTrainedTokenizerBase

from calm.configuration import AutoencoderConfig
from calm.data.encoding import vocabulary_size
from calm.errors import UserError
from calm.models import Autoencoder
from calm.training.arguments import JobArguments
from calm.training.building import check_vocabulary, check_weights, load_pretrained, new_config
from calm.training.job import run_stage
from calm.training.recipe import Stage

__all__ = ["build_model", "main"]


def build_model(arguments: JobArguments, tokenizer: PreTrainedTokenizerBase) -> Autoencoder:
    """A new autoencoder for `tokenizer`, or the one at ``model_name_or_path``."""
    model = arguments.model
    if model.model_name_or_path:
        loaded = load_pretrained(Autoencoder, model.model_name_or_path, model, "model_name_or_path")
        check_vocabulary(loaded.config.vocab_size, tokenizer, "the autoencoder")
        return loaded
    config = new_config(AutoencoderConfig, model, tokenizer, vocab_size=vocabulary_size(tokenizer))
    check_vocabulary(config.vocab_size, tokenizer, "the autoencoder")
    if config.whitening != "none" and arguments.training.fsdp:
        raise UserError(
            f"whitening needs whole matrices when training ends, and fsdp splits them; got "
            f"{config.whitening!r}: set whitening=none, or take fsdp out"
        )
    check_weights(Autoencoder, config)
    return Autoencoder(config)


def main(argv: list[str] | None = None) -> int:
    """Train an autoencoder; the exit status."""
    return run_stage(Stage.AUTOENCODER, build_model, argv)


if __name__ == "__main__":
    raise SystemExit(main())
