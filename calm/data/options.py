"""What to read, as the flags of training name it; reading it is for `calm.data.corpus`."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["SCORED_BLOCK_SIZE", "TOKENIZER_DOCUMENTS", "CorpusOptions", "OnError", "TextUnit"]

TOKENIZER_DOCUMENTS = 100_000  # that a tokenizer is trained on, at most
SCORED_BLOCK_SIZE = 2048  # tokens of a block that a model is scored on, unless its context is less

TextUnit = Literal["line", "paragraph", "file"]
OnError = Literal["stop", "skip"]


@dataclass(frozen=True, kw_only=True)
class CorpusOptions:
    """What to read. Names and meanings are those of the training flags."""

    train_file: str | None = None
    validation_file: str | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    streaming: bool = False
    validation_split_percentage: float = 5
    keep_linebreaks: bool = True
    text_unit: TextUnit = "line"
    on_error: OnError = "stop"
    cache_dir: str | None = None
    overwrite_cache: bool = False
    preprocessing_num_workers: int | None = None
    token: str | None = None
    revision: str | None = None
