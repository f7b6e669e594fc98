"""Configurations of autoencoder and language models: published field names, checked values."""

import logging
import os
import re
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar, Literal

from transformers import LlamaConfig, PreTrainedConfig

from calm.configuration_autoencoder import AutoencoderConfig, Initializer
from calm.configuration_checks import (
    check_backbone,
    check_tempered_range,
    check_tempered_spread,
    checked,
    require,
    require_positive,
)

__all__ = [
    "HEAD_TYPES",
    "AutoencoderConfig",
    "CALMConfig",
    "locate_autoencoder",
    "model_kind",
]

logger = logging.getLogger(__name__)

HEAD_TYPES = ("energy", "diffusion", "flow")


def locate_autoencoder(
    ae_path: str | None, checkpoint: str | os.PathLike[str] = "", *, is_named: bool = False
) -> str | None:
    """The folder or hub name that `ae_path` means; None if there is none.

    It is tried as given, then relative to the folder `checkpoint`. It may be a name on a hub only
    where the user's own words name a hub: a file in a local folder never leads to the network.

    Args:
        ae_path: folder or hub name.
        checkpoint: folder or hub name of the language model whose file says `ae_path`.
        is_named: the user has given `ae_path`, not a file.
    """
    if not ae_path:
        return None
    for folder in (Path(ae_path), Path(checkpoint) / ae_path):
        if (folder / "config.json").is_file():
            return str(folder)
    is_hub_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", ae_path) and not Path(ae_path).exists()
    may_ask_hub = is_named or not Path(checkpoint).is_dir()
    return ae_path if is_hub_name and may_ask_hub else None


@checked
class CALMConfig(LlamaConfig):
    """Shape, loss and head of a language model over chunks, on top of the fields of `LlamaConfig`.

    Args:
        patch_size: K, tokens of a chunk.
        latent_size: l, width of the latent that the head draws.
        noise_size: width of the energy head's noise.
        num_mlp_layers: residual blocks of the head.
        num_samples: N, draws of the head per position in training; at least 2 for the energy head.
        beta: exponent α of the energy score, in (0, 2).
        targets: target term of the energy loss: ``analytic`` (its exact expectation), ``sample``
            (published: mean over `num_targets` draws) or ``antithetic``.
        num_targets: M, draws of a sampled target term.
        head_type: ``energy``, ``diffusion`` or ``flow``; None leaves it to the model class.
        head_init: last layer of the head: ``zero`` (published) or ``scaled``, N(0, 1 / width),
            which learns much faster at small scale.
        head_recompute: training saves one array a block of the head and computes the others again
            in the backward pass: less memory, the same numbers. Gradient checkpointing does so too.
        sampling_steps: of the flow head's sampler (published: 10) or of the diffusion head's
            (published: 100, at least 2); None for the published. Training does not use it.
        flow_sampler: ``midpoint`` (published), two evaluations a step, or ``euler``, one.
        input_type: what a chunk enters the backbone as: its ``tokens`` (published), its ``latent``
            (the autoencoder's mean) or ``both``, summed (section 7.4).
        token_loss_weight: weight of a training term, the cross-entropy of each next token, read
            from the hidden state by `calm.models.readout`; 0 for none, as published. The loss of an
            evaluation is without it.
        token_readout: its slots: ``independent``, each read from the hidden state alone, or
            ``causal``, each with the chunk's tokens before it too, for ``method="readout"``.
        keep_token_readout: save the readout with the trained model; it is otherwise in checkpoints
            alone, and the saved model is one that never had it.
        token_score_weight: weight of a training term of the energy head, the score of tokens that
            `calm.models.token_score` defines; 0 for none, as published.
        token_score_start: share of the training before which that term is off, and costs nothing.
        token_score_samples: how many of the num_samples draws it takes, at least 2.
        tempered_range: least and largest T < 1 of which a second energy head draws in one step
            (`calm.models.heads.tempered`), which ``calm distill-temperature`` adds to a trained
            model and trains; None for none, as published.
        tempered_spread: pairs of a T and the factor on what that head's noise contributes there, T
            increasing; the logarithm of the factor is linear in that of T between them. None for 1.
        noise_policy: the energy head draws its noise from a learned density
            (`calm.models.heads.steered`), which ``calm post-train --method policy`` adds to a
            trained model and trains; False for uniform noise, as published.
        has_start_patch: a chunk of K begin tokens (bos_token_id) stands before each document, in
            training and before every prompt, so that first chunks are predicted too.
        initializer, embedding_std: see `AutoencoderConfig`.
        ae_config: configuration of the autoencoder; checkpoints hold it, so that they need no
            other folder.
        ae_path: folder or hub name of the autoencoder, for files that lack `ae_config`; taken as
            given, then relative to the checkpoint. A file in a local folder may not name a hub.
            Never saved once `ae_config` is known.

    A published file may have ``energy``, ``diffusion`` or ``flow`` as its model type: it moves to
    `head_type` with a warning. Or it has none: then the class that loads it decides.

    Source: CALM, sections 3 and 7.1.
    """

    model_type = "calm"
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {"ae_config": AutoencoderConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = [  # type: ignore[misc] # as in LlamaConfig
        "past_key_values", "last_hidden_state", "fidelity", "diversity", "token_loss",
        "token_score",
    ]  # fmt: skip

    vocab_size: int = 128256
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    patch_size: int = 4
    latent_size: int = 128
    noise_size: int = 64
    num_mlp_layers: int = 4
    num_samples: int = 8
    beta: int | float = 1.0
    targets: Literal["analytic", "antithetic", "sample"] = "analytic"
    num_targets: int = 100
    head_type: Literal["energy", "diffusion", "flow"] | None = None
    head_init: Literal["zero", "scaled"] = "zero"
    head_recompute: bool = False
    sampling_steps: int | None = None
    flow_sampler: Literal["midpoint", "euler"] = "midpoint"
    input_type: Literal["tokens", "latent", "both"] = "tokens"
    token_loss_weight: int | float = 0
    token_readout: Literal["independent", "causal"] = "independent"
    keep_token_readout: bool = False
    token_score_weight: int | float = 0
    token_score_start: int | float = 0
    token_score_samples: int = 2
    tempered_range: list[int | float] | None = None
    tempered_spread: list[list[float]] | None = None
    noise_policy: bool = False
    has_start_patch: bool = False
    initializer: Initializer = "normal"
    embedding_std: int | float | None = None
    ae_config: dict | PreTrainedConfig | None = None
    ae_path: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs = _with_head_type(kwargs)
        kwargs.pop("model_type", None)  # that of the class
        require_positive(self, "num_attention_heads")  # sizes are divided by it
        self.head_type = kwargs.pop("head_type", self.head_type)
        if isinstance(self.ae_config, dict):
            self.ae_config = AutoencoderConfig(**self.ae_config)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Checks across fields; run on construction and on saving."""
        check_backbone(self)
        require_positive(
            self, "patch_size", "latent_size", "noise_size", "num_mlp_layers", "num_samples",
            "num_targets",
        )  # fmt: skip
        super().validate_architecture()
        require(0 < self.beta < 2, f"beta must lie in (0, 2), exclusive, got {self.beta}")
        require(
            self.num_samples >= 2 or self.head_type != "energy",
            f"num_samples must be at least 2 for the energy score, got {self.num_samples}",
        )
        require(
            self.targets != "antithetic" or self.num_targets % 2 == 0,
            f'num_targets must be even for targets="antithetic", got {self.num_targets}',
        )
        self._check_sampling_steps()
        self._check_training_terms()
        check_tempered_range(self.tempered_range, self.head_type)
        check_tempered_spread(self.tempered_spread, self.tempered_range)
        require(
            not self.noise_policy or self.head_type in (None, "energy"),
            f"noise_policy must be false for the {self.head_type} head: an energy head alone can "
            "have one",
        )
        self._check_start_patch()
        if isinstance(self.ae_config, PreTrainedConfig):
            self._check_pair(self.ae_config)

    def _check_sampling_steps(self) -> None:
        steps, head = self.sampling_steps, self.head_type
        least = 2 if head == "diffusion" else 1
        require(
            steps is None or least <= steps <= 1000,
            f"sampling_steps must lie between {least} and 1000, got {steps}",
        )
        require(
            steps is None or head != "energy",
            f"sampling_steps must be None for the energy head, whose draw is one step; got {steps}",
        )

    def _check_training_terms(self) -> None:
        for name in ("token_loss_weight", "token_score_weight"):
            weight = getattr(self, name)
            require(weight >= 0, f"{name} must be at least 0, got {weight}")
        require(
            self.token_loss_weight == 0 or self.input_type != "latent",
            f"token_loss_weight must be 0 for input_type='latent', whose backbone has no token "
            f"embedding to score tokens with; got {self.token_loss_weight}: set input_type=both",
        )
        start, draws, head = self.token_score_start, self.token_score_samples, self.head_type
        require(0 <= start <= 1, f"token_score_start must lie in [0, 1], got {start}")
        if self.token_score_weight == 0:
            return
        require(
            head in (None, "energy"),
            f"token_score_weight must be 0 for the {head} head, which has no draws in training; "
            f"got {self.token_score_weight}",
        )
        require(
            2 <= draws <= self.num_samples,
            f"token_score_samples must lie between 2 and num_samples, {self.num_samples}, got "
            f"{draws}",
        )

    def _check_start_patch(self) -> None:
        token = self.bos_token_id
        require(
            not self.has_start_patch or (isinstance(token, int) and 0 <= token < self.vocab_size),
            f"has_start_patch needs bos_token_id, a token id below {self.vocab_size} for the chunk "
            f"before each document, got {token}: give the tokenizer a begin token "
            "(tokenizer.add_special_tokens({'bos_token': ...})) and save it, or set "
            "has_start_patch=false",
        )

    def _check_pair(self, ae_config: PreTrainedConfig) -> None:
        for name in ("vocab_size", "patch_size", "latent_size"):
            own, other = getattr(self, name), getattr(ae_config, name)
            require(
                own == other,
                f"{name} of the language model, {own}, differs from that of its autoencoder, "
                f"{other}; set {name}={other}, or pass another autoencoder",
            )

    def pair_with(self, ae_config: PreTrainedConfig) -> None:
        """Adopt the configuration of an autoencoder; raises `UserError` if the two disagree."""
        self._check_pair(ae_config)
        self.ae_config = deepcopy(ae_config)

    def find_autoencoder(
        self, checkpoint: str | os.PathLike[str] = "", *, is_named: bool = False
    ) -> None:
        """Adopt the configuration of the autoencoder at `ae_path`, if it is missing and found.

        Arguments as for `locate_autoencoder`.
        """
        found = locate_autoencoder(self.ae_path, checkpoint, is_named=is_named)
        if self.ae_config is None and found is not None:
            try:
                ae_config = AutoencoderConfig.from_pretrained(found)
            except OSError as error:  # a name that the hub does not know, or no network
                logger.warning("no autoencoder at ae_path %r: %s", self.ae_path, error)
                return
            self.pair_with(ae_config)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers; an old model type becomes the head type."""
        fields, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return _with_head_type(fields), unused

    @classmethod
    def from_pretrained(  # type: ignore[override] # passes all keywords on
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> Any:
        """As in transformers; a file without `ae_config` takes that of the model at `ae_path`."""
        is_named = kwargs.get("ae_path") is not None
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config.find_autoencoder(pretrained_model_name_or_path, is_named=is_named)
        return loaded

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields that are saved; `ae_path` only without the autoencoder's configuration."""
        fields = super().to_diff_dict()
        if self.ae_config is not None:
            fields.pop("ae_path", None)
            for name in ("_name_or_path", "dtype"):  # those of the whole model count
                fields["ae_config"].pop(name, None)
        return fields


def _with_head_type(fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` of a file, with an old model type ('energy', ...) moved to the head type."""
    model_type = fields.get("model_type")
    if model_type not in HEAD_TYPES:
        return fields
    logger.warning("model_type %r is read as head_type; saving writes a current file", model_type)
    moved = {name: value for name, value in fields.items() if name != "model_type"}
    return {**moved, "head_type": model_type}


def model_kind(config: dict[str, Any]) -> str:
    """``energy``, ``diffusion``, ``flow``, ``baseline``, ``autoencoder``, or another model type.

    Published files may have the kind of head as their model type, or no model type.
    """
    model_type = config.get("model_type")
    if model_type == "llama":
        return "baseline"
    if "ae_path" in config or "ae_config" in config or model_type == "calm":
        named = config.get("head_type") or model_type
        return "energy" if named in (None, "calm") else named
    if "num_encoder_layers" in config:
        return "autoencoder"
    return str(model_type)
