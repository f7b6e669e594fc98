r"""Stage one: the autoencoder.

    python -m calm.training.train_autoencoder --config autoencoder --train_file runs/pile \
        --output_dir runs/ae

`calm train-ae` is the same. ``torchrun -m`` instead of ``python -m`` trains on several devices.
"""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from calm.configuration import AutoencoderConfig
from calm.data.encoding import vocabulary_size
from calm.data.tokenizer import tokenizer_hash
from calm.errors import UserError
from calm.models import Autoencoder, BaselineTransformer
from calm.training.building import check_vocabulary, check_weights, load_pretrained, new_config
from calm.training.checkpoints.resume import read_protocol
from calm.training.flags.arguments import JobArguments
from calm.training.flags.recipe import Stage
from calm.training.job import run_stage

__all__ = ["build_model", "main"]


def build_model(arguments: JobArguments, tokenizer: PreTrainedTokenizerBase) -> Autoencoder:
    """A new autoencoder for `tokenizer`, or the one at ``model_name_or_path``."""
    model = arguments.model
    if model.model_name_or_path:
        built = load_pretrained(Autoencoder, model.model_name_or_path, model, "model_name_or_path")
    else:
        config = new_config(
            AutoencoderConfig, model, tokenizer, vocab_size=vocabulary_size(tokenizer)
        )
        check_weights(Autoencoder, config)
        built = Autoencoder(config)
    check_vocabulary(built.config.vocab_size, tokenizer, "the autoencoder")
    if built.config.whitening != "none" and arguments.training.is_sharded:
        raise UserError(
            f"whitening needs whole matrices when training ends, and fsdp splits them; got "
            f"{built.config.whitening!r}: set whitening=none, or take fsdp out"
        )
    if arguments.training.do_train:
        _attach_teacher(built, arguments, tokenizer)
    return built


def _attach_teacher(
    model: Autoencoder, arguments: JobArguments, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Load the teacher that ``alignment_weight`` needs; errors where one is there without other."""
    name, weight = arguments.model.teacher_name_or_path, model.config.alignment_weight
    if (name is not None) != (weight > 0):
        raise UserError(
            "teacher_name_or_path and alignment_weight go together: the folder of a trained token "
            f"baseline, and its weight above 0 (--config_overrides); got {name!r} and {weight}"
        )
    if name is None:
        return
    teacher = load_pretrained(BaselineTransformer, name, arguments.model, "teacher_name_or_path")
    known = read_protocol(Path(name)).get("tokenizer_hash")
    if known not in (None, tokenizer_hash(tokenizer)):
        raise UserError(
            f"teacher_name_or_path: {name} was trained with another tokenizer: train both with one"
        )
    context = teacher.config.max_position_embeddings
    if context < arguments.block_size:
        raise UserError(
            f"teacher_name_or_path: {name} reads {context} tokens, and a block has "
            f"{arguments.block_size}: pass a smaller block_size"
        )
    model.attach_teacher(teacher)


def main(argv: list[str] | None = None) -> int:
    """Train an autoencoder; the exit status."""
    return run_stage(Stage.AUTOENCODER, build_model, argv)


if __name__ == "__main__":
    raise SystemExit(main())
