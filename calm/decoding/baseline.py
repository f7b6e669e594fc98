"""Generation with the token-by-token baseline, through the same engine as a CALM's."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from calm.decoding.loop import Request, continue_prompts, prepare
from calm.decoding.predictors import TokenPredictor
from calm.decoding.prompt import Prompts
from calm.decoding.result import Generation
from calm.models.baseline import BaselineTransformer
from calm_kernels.noise import Seed

__all__ = ["generate_tokens", "warmup_tokens"]


def generate_tokens(
    model: BaselineTransformer,
    input_ids: Prompts,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    temperature: float = 0.5,
    stop_strings: str | list[str] | None = None,
    tokenizer: Any = None,
    truncate: bool = False,
    seed: Seed | Sequence[int] = None,
    streamer: BaseStreamer | None = None,
    return_details: bool = False,
) -> Tensor | Generation:
    """Continue prompts token by token, sampling from the softmax at `temperature`.

    Args:
        model: the baseline.
        input_ids: as in `calm.decoding.generate`, like all that is not listed here.
        attention_mask: likewise.
        max_new_tokens: likewise.
        max_length: likewise.
        temperature: T in (0, 1]; 1 samples the model. No top-k or top-p.
        stop_strings: likewise.
        tokenizer: likewise.
        truncate: likewise.
        seed: likewise.
        streamer: likewise.
        return_details: likewise; a chunk is one token.

    Returns: prompts and continuations, ``[B, T']``, or a `Generation`.
    Raises:
        UserError: an argument out of range, ids beyond the vocabulary, no room in the context,
            logits that are not finite.
    """
    request = Request(
        input_ids=input_ids,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
        truncate=truncate,
        seed=seed,
        streamer=streamer,
    )
    generation = continue_prompts(TokenPredictor(model, temperature), request)
    return generation if return_details else generation.sequences


def warmup_tokens(
    model: BaselineTransformer, *, batch_size: int = 1, max_length: int, temperature: float = 0.5
) -> float:
    """`calm.decoding.warmup` for the baseline."""
    predictor = TokenPredictor(model, temperature)
    return prepare(predictor, batch_size=batch_size, max_length=max_length)
