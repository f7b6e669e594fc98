"""What the autoencoder and the language models share: loading, saving, initial weights."""

import os
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel

from calm.configuration import HEAD_TYPES
from calm.integrity import check_files
from calm.models.initialization import initialize
from calm.models.loading import check_kind
from calm.pretrained import packaged

__all__ = ["CALMPreTrainedModel"]


class CALMPreTrainedModel(PreTrainedModel):
    """A `PreTrainedModel` that reads published files whichever name of an aliased weight they hold.

    A published file may hold a weight under either of two names, or under both. `aliases` maps the
    name that is not registered here to the one that is (pattern to name). Where a file holds both,
    they are the same tensor and one is read.
    """

    aliases: ClassVar[dict[str, str]] = {}
    kinds: ClassVar[tuple[str, ...]] = HEAD_TYPES  # that `calm.configuration.model_kind` may find
    # forward returns a mean and takes no num_items_in_batch: the Trainer divides by the
    # accumulation steps itself.
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers; the dtype is the configuration's unless ``dtype=`` says otherwise.

        One of `calm.pretrained.PRETRAINED` is the model that comes with the package, unless there
        is a folder of that name.

        Raises:
            UserError: files of the folder are not those that were saved (`calm.integrity`); a
                model of another kind.
        """
        if pretrained_model_name_or_path is not None:
            pretrained_model_name_or_path = packaged(pretrained_model_name_or_path)
        check_files(pretrained_model_name_or_path)
        check_kind(pretrained_model_name_or_path, cls.kinds, cls)
        mapping = {**cls.aliases, **(key_mapping or {})}
        return super().from_pretrained(
            pretrained_model_name_or_path, *model_args, key_mapping=mapping or None, **kwargs
        )

    def save_pretrained(  # type: ignore[override] # passes all keywords on
        self, save_directory: str | os.PathLike[str], **kwargs: Any
    ) -> None:
        """As in transformers, under the registered names, whatever names were loaded."""
        super().save_pretrained(save_directory, **{"save_original_format": False, **kwargs})

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialize(module, self.config)
