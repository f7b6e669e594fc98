"""Generation with a CALM: one backbone step, N head draws and one vote for every K tokens.

The prompt is read once; afterwards the cache, which counts chunks, grows by one a step. A chunk
enters the backbone as tokens, never as the latent that it was decoded from.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from calm.decoding.prompt import Prompt, align_prompt, check_prompt, fit_context
from calm.decoding.sampling import advance, draw_completions, draw_patches, row_of, sequence_seeds
from calm.decoding.temperature import candidates_needed, check_sampling, vote
from calm.decoding.transcript import Transcript, end_tokens
from calm.errors import UserError
from calm.models.continuous import ContinuousTransformer
from calm_kernels.noise import Seed

__all__ = ["Generation", "generate"]

MAX_ROUNDS = 25  # of N draws each, by default, that conditioning on a prompt's end may take


@dataclass(frozen=True)
class Generation:
    """What `generate` returns with ``return_details=True``.

    Attributes:
        sequences: prompt and new tokens, ``[B, T]``.
        new_tokens: generated tokens of each sequence, ``[B]``; what follows is padding.
        levels: draws that agreed on each new chunk, ``[B, chunks]``: 1/T where the vote found as
            many, less where it had to settle for less, 0 after the end of a sequence.
        draws: candidates drawn for a sequence, in all.
        seconds: wall time.
    """

    sequences: Tensor
    new_tokens: Tensor
    levels: Tensor
    draws: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all sequences by wall time."""
        return float(self.new_tokens.sum()) / self.seconds


class _Chunk(NamedTuple):
    tokens: Tensor  # [B, K]
    level: Tensor  # [B]
    draws: int


@dataclass(frozen=True, kw_only=True)
class _Sampling:
    """How chunks are chosen; fields as the arguments of `generate`."""

    temperature: float
    num_samples: int
    noise_scale: float
    max_draws: int

    def choose(self, model: ContinuousTransformer, hidden: Tensor, seed: Tensor) -> _Chunk:
        """The chunk after each state ``[B, H]``."""
        needed = candidates_needed(self.temperature, self.num_samples)
        candidates = draw_patches(
            model, hidden, num_samples=needed, seed=seed, noise_scale=self.noise_scale
        ).transpose(0, 1)  # [B, N, K]
        return _Chunk(*vote(candidates, self.temperature, seed=seed), needed)

    def complete(
        self, model: ContinuousTransformer, hidden: Tensor, given: Tensor, seed: Tensor
    ) -> _Chunk:
        """The chunk after each state ``[B, H]``, given its first tokens ``[B, r]``."""
        kept, draws = draw_completions(
            model,
            hidden,
            given,
            needed=candidates_needed(self.temperature, self.num_samples),
            num_samples=self.num_samples,
            max_draws=self.max_draws,
            seed=seed,
            noise_scale=self.noise_scale,
        )
        votes = []
        for row, candidates in enumerate(kept):  # rows keep different numbers of candidates
            row_seed, first_row = row_of(seed, row)
            votes.append(
                vote(candidates[None], self.temperature, seed=row_seed, first_row=first_row)
            )
        tokens, level = (torch.cat(parts) for parts in zip(*votes, strict=True))
        return _Chunk(tokens, level, draws)


@torch.no_grad()
def generate(
    model: ContinuousTransformer,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    temperature: float = 0.5,
    num_samples: int = 200,
    method: str = "batch",
    noise_scale: float = 1.0,
    prompt_alignment: str = "condition",
    max_draws: int | None = None,
    truncate: bool = False,
    seed: Seed | Sequence[int] = None,
    streamer: BaseStreamer | None = None,
    return_details: bool = False,
) -> Tensor | Generation:
    """Continue prompts, K tokens at a time.

    A sequence ends after the chunk that holds an end token (tokens behind it in that chunk stay);
    the rest of its row is padding.

    Args:
        model: a CALM with any head.
        input_ids: prompts of one length, ``[B, T]``, int64.
        attention_mask: may be passed, but must hide nothing.
        max_new_tokens: tokens to add at most.
        max_length: tokens of prompt and continuation; pass this or `max_new_tokens`.
        temperature: T in (0, 1]; 1 samples the model, below it each chunk is voted for.
        num_samples: N, candidates of a vote; the more, the closer to P^(1/T).
        method: ``batch``, Algorithm 2 of the paper.
        noise_scale: factor on the head's noise; 0 is deterministic.
        prompt_alignment: what becomes of prompt tokens that fill no whole chunk. ``condition``
            draws the first chunk given them. ``pad`` fills the chunk with pad tokens, as published:
            they count towards `max_length`, which may be overshot by up to K - 1 tokens, and all
            pad tokens move to the end of the row afterwards.
        max_draws: draws a sequence that conditioning may take; default 25 N.
        truncate: drop the beginning of a prompt that is too long instead of raising.
        seed: an int; or one int for each sequence, whose text then does not depend on the others
            of the batch; None takes one from torch's default generator.
        streamer: receives the prompt, then the tokens of each chunk (`transformers.TextStreamer`
            prints them).
        return_details: return a `Generation`.

    Returns: prompt and continuation, ``[B, T']``, or a `Generation`.
    Raises:
        UserError: an argument out of range, ids beyond the vocabulary, no room in the context,
            latents that are not finite, a prompt whose end no draw continues.
    Source: paper, section 3.3.3 and Algorithm 2.
    """
    begin = time.perf_counter()
    check_sampling(temperature, num_samples, noise_scale, method)
    check_prompt(input_ids, attention_mask, model.config.vocab_size)
    new_tokens = _new_tokens(input_ids.shape[1], max_new_tokens, max_length)
    input_ids = fit_context(
        input_ids,
        new_tokens=new_tokens,
        patch_size=model.patch_size,
        context=model.config.max_position_embeddings - model.config.has_start_patch,
        truncate=truncate,
    )
    prompt = align_prompt(
        input_ids,
        patch_size=model.patch_size,
        alignment=prompt_alignment,
        pad_token_id=model.config.pad_token_id,
    )
    sampling = _Sampling(
        temperature=temperature,
        num_samples=num_samples,
        noise_scale=noise_scale,
        max_draws=max_draws or MAX_ROUNDS * num_samples,
    )
    transcript = Transcript(
        prompt,
        end_ids=end_tokens(model.config.eos_token_id, input_ids.device),
        pad_token_id=model.config.pad_token_id,
        limit=prompt.length + new_tokens if max_length is None else max_length,
        may_overshoot=prompt_alignment == "pad" and max_length is not None,
        streamer=streamer,
    )
    base = sequence_seeds(seed, len(input_ids), input_ids.device)
    levels, draws = [], 0
    try:
        if streamer is not None:
            streamer.put(input_ids.cpu())
        for chunk in _chunks(model, prompt, sampling, base):
            levels.append(chunk.level.masked_fill(transcript.has_ended, 0))
            draws += chunk.draws
            transcript.append(chunk.tokens)
            if transcript.is_complete:
                break
    finally:
        if streamer is not None:
            streamer.end()
    sequences = transcript.sequences(move_padding=prompt_alignment == "pad")
    if not return_details:
        return sequences
    seconds = time.perf_counter() - begin
    return Generation(sequences, transcript.new_tokens, torch.stack(levels, 1), draws, seconds)


def _chunks(
    model: ContinuousTransformer, prompt: Prompt, sampling: _Sampling, seed: Tensor
) -> Iterator[_Chunk]:
    """Chunk after chunk, without end; chunk i draws from the seed advanced by i."""
    cache = DynamicCache(config=model.transformer.config)
    inputs = _prompt_embeds(model, prompt)
    for index in count():
        hidden = model.transformer(
            inputs_embeds=inputs, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        here = advance(seed, index)
        if index == 0 and prompt.given.shape[1]:
            chunk = sampling.complete(model, hidden, prompt.given, here)
        else:
            chunk = sampling.choose(model, hidden, here)
        yield chunk
        inputs = model.embed_patches(chunk.tokens)


def _prompt_embeds(model: ContinuousTransformer, prompt: Prompt) -> Tensor:
    """Start chunk, if the model has one, and whole chunks of the prompt, ``[B, P, H]``."""
    start = model.start_tokens(len(prompt.input_ids)).to(prompt.input_ids.device)
    input_ids = torch.cat([start, prompt.input_ids], dim=1)
    if input_ids.shape[1]:
        return model.embed_patches(input_ids)
    raise UserError(
        f"the prompt must hold at least one chunk of {model.patch_size} tokens, "
        f'got {prompt.length}; lengthen it, or pass prompt_alignment="pad"'
    )


def _new_tokens(length: int, max_new_tokens: int | None, max_length: int | None) -> int:
    """Tokens to generate after a prompt of `length` tokens."""
    if max_new_tokens is not None and max_length is None:
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        return max_new_tokens
    if max_length is not None and max_new_tokens is None:
        if max_length <= length:
            raise UserError(
                f"max_length must exceed the {length} tokens of the prompt, got {max_length}"
            )
        return max_length - length
    raise UserError("pass either max_new_tokens or max_length")
