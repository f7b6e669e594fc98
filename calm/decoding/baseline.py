"""Generation with the token-by-token baseline: transformers' own cached sampling."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from calm.decoding.prompt import check_prompt, fit_context
from calm.errors import UserError
from calm.models.baseline import BaselineTransformer

__all__ = ["generate_tokens"]


def generate_tokens(
    model: BaselineTransformer,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.5,
    truncate: bool = False,
    seed: int | Sequence[int] | None = None,
    streamer: BaseStreamer | None = None,
) -> Tensor:
    """Continue prompts token by token, sampling from the softmax at `temperature`.

    Args:
        model: the baseline.
        input_ids: prompts of one length, ``[B, T]``, int64.
        max_new_tokens: tokens to add at most.
        temperature: T in (0, 1]; 1 samples the model. No top-k or top-p.
        truncate: drop the beginning of a prompt that is too long instead of raising.
        seed: an int; one for each sequence, which are then generated one by one; or None for
            torch's default generator.
        streamer: receives prompt and tokens.

    Returns: prompt and continuation, ``[B, T']``; padding after the end of a sequence.
    Raises:
        UserError: an argument out of range, ids beyond the vocabulary, no room in the context.
    """
    if not 0.0 < temperature <= 1.0:
        raise UserError(f"temperature must lie in (0, 1], got {temperature}")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    check_prompt(input_ids, None, model.config.vocab_size)
    input_ids = fit_context(
        input_ids,
        new_tokens=max_new_tokens,
        patch_size=1,
        context=model.config.max_position_embeddings,
        truncate=truncate,
    )
    if seed is None or isinstance(seed, int):
        return _sample(model, input_ids, max_new_tokens, temperature, seed, streamer)
    if len(seed) != len(input_ids):
        raise UserError(
            f"seed must hold one number per sequence, {len(input_ids)}; got {len(seed)}"
        )
    rows = [
        _sample(model, row[None], max_new_tokens, temperature, row_seed, streamer)[0]
        for row, row_seed in zip(input_ids, seed, strict=True)
    ]
    return pad_sequence(rows, batch_first=True, padding_value=_pad_token_id(model) or 0)


def _sample(
    model: BaselineTransformer,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    seed: int | None,
    streamer: BaseStreamer | None,
) -> Tensor:
    """Sample; a `seed` leaves torch's default generators as they were."""
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        max_new_tokens=max_new_tokens,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=_pad_token_id(model),
    )
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            return cast(Any, model).generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                generation_config=config,
                streamer=streamer,
            )
        except BaseException:  # Ctrl-C too: what was generated is shown
            if streamer is not None:
                streamer.end()
            raise


def _pad_token_id(model: BaselineTransformer) -> int | None:
    """The pad token, or the (first) end token in its place."""
    ends = model.config.eos_token_id
    if model.config.pad_token_id is not None:
        return model.config.pad_token_id
    return ends[0] if isinstance(ends, list) else ends
