r"""Stage two: the continuous language model on a trained autoencoder.

    python -m calm.training.train_calm --config calm-m --ae_name_or_path runs/ae \
        --train_file runs/pile

`calm train` is the same. ``torchrun -m`` instead of ``python -m`` trains on several devices.
"""

from transformers import PreTrainedTokenizerBase

from calm.configuration import HEAD_TYPES, CALMConfig
from calm.errors import UserError
from calm.models import MODEL_CLASSES, Autoencoder, ContinuousTransformer, EnergyTransformer
from calm.models.loading import load_config
from calm.training.building import check_vocabulary, check_weights, load_pretrained, new_config
from calm.training.flags.arguments import NO_AUTOENCODER, JobArguments, ModelArguments
from calm.training.flags.config_overrides import parse_overrides
from calm.training.flags.recipe import Stage
from calm.training.job import run_stage

__all__ = ["build_model", "main", "new_or_trained", "with_energy_head"]


def build_model(
    arguments: JobArguments, tokenizer: PreTrainedTokenizerBase
) -> ContinuousTransformer:
    """A new model on the autoencoder ``ae_name_or_path``, or the one at ``model_name_or_path``."""
    model = new_or_trained(arguments, tokenizer)
    if model.config.tempered_range and arguments.training.do_train:
        raise UserError(
            f"model_name_or_path: the head of {arguments.model.model_name_or_path} that has "
            "learned temperatures would not fit any more: go on with the model that it was made of"
        )
    return model


def new_or_trained(
    arguments: JobArguments, tokenizer: PreTrainedTokenizerBase
) -> ContinuousTransformer:
    """The model that the flags name, as it is."""
    model = arguments.model
    loaded = _continued(model) if model.model_name_or_path else _new(model, tokenizer)
    check_vocabulary(loaded.config.vocab_size, tokenizer, "the language model")
    return loaded


def with_energy_head(
    model: ContinuousTransformer, arguments: JobArguments, *, use: str
) -> EnergyTransformer:
    """`model`, whose head is an energy head.

    Args:
        model: the one at ``model_name_or_path``.
        arguments: of the job.
        use: what an energy head alone can do, for the message.

    Raises:
        UserError: it has another head.
    """
    if not isinstance(model, EnergyTransformer):
        raise UserError(
            f"model_name_or_path: {arguments.model.model_name_or_path} has a {model.head_type} "
            f"head; an energy head alone can {use}"
        )
    return model


def _head_type(arguments: ModelArguments) -> str | None:
    """The type of head that the flags name, or None."""
    named = {
        arguments.model_type,
        parse_overrides(arguments.config_overrides).get("model_type"),
        parse_overrides(arguments.config_overrides).get("head_type"),
    } - {None}
    if len(named) > 1 or not named <= set(HEAD_TYPES):
        given = ", ".join(sorted(map(str, named)))
        raise UserError(f"model_type must be one of {', '.join(HEAD_TYPES)}, got {given}")
    return next(iter(named), None)


def _continued(arguments: ModelArguments) -> ContinuousTransformer:
    name = str(arguments.model_name_or_path)
    options = {"ae_path": arguments.ae_name_or_path} if arguments.ae_name_or_path else {}
    saved = load_config(CALMConfig, name, "model_name_or_path", **options).head_type
    model_class = MODEL_CLASSES[_head_type(arguments) or saved or HEAD_TYPES[0]]
    return load_pretrained(model_class, name, arguments, "model_name_or_path", **options)


def _new(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> ContinuousTransformer:
    if not arguments.ae_name_or_path:
        raise UserError(NO_AUTOENCODER)
    autoencoder = load_pretrained(
        Autoencoder, arguments.ae_name_or_path, arguments, "ae_name_or_path"
    )
    shared = {
        name: getattr(autoencoder.config, name)
        for name in ("vocab_size", "patch_size", "latent_size")
    }
    head_type = _head_type(arguments) or HEAD_TYPES[0]
    config = new_config(
        CALMConfig, arguments, tokenizer, {"rope_theta": float}, head_type=head_type, **shared
    )
    config.pair_with(autoencoder.config)
    check_weights(MODEL_CLASSES[head_type], config)
    return MODEL_CLASSES[head_type].from_autoencoder(autoencoder, config)


def main(argv: list[str] | None = None) -> int:
    """Train a continuous language model; the exit status."""
    return run_stage(Stage.CALM, build_model, argv)


if __name__ == "__main__":
    raise SystemExit(main())
