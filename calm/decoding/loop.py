"""The loop: prompts in, chunk after chunk, text out; with any kind of model.

On a GPU a captured decode step is replayed, and the host reads the chunks every few steps, because
that synchronises. Elsewhere, and for methods that cannot be captured, the same step runs operation
by operation, and sequences that have ended are dropped from the batch.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from calm.decoding.chunk import read_records
from calm.decoding.engine.cuda_graph import CapturedStep, captured_step
from calm.decoding.engine.decode_step import DecodeState, decode_step, first_chunk, prefill
from calm.decoding.engine.predictors import Predictor
from calm.decoding.sampling.seeds import sequence_seeds
from calm.decoding.text.prompt import (
    Prompt,
    PromptFormat,
    Prompts,
    left_aligned,
    read_prompts,
)
from calm.decoding.text.result import Generation, Times, assemble
from calm.decoding.text.stopping import StopStrings, end_tokens
from calm.decoding.text.transcript import Transcript
from calm.errors import UserError
from calm.integrity import check_finite
from calm_kernels.noise import Seed

__all__ = ["Request", "continue_prompts", "draw_first", "prepare", "read"]

STEPS_PER_SYNC = 8  # decode steps of a captured graph between two reads by the host


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate, whatever the model; fields as the arguments of `calm.decoding.generate`."""

    input_ids: Prompts
    attention_mask: Tensor | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    prompt_alignment: str = "condition"
    stop_strings: str | list[str] | None = None
    tokenizer: Any = None
    truncate: bool = False
    seed: Seed | Sequence[int] = None
    streamer: BaseStreamer | None = None


@torch.no_grad()
def continue_prompts(predictor: Predictor, request: Request) -> Generation:
    """Continue the prompts of a request; see `calm.decoding.generate`."""
    config, device = predictor.model.config, predictor.model.device
    ends, stops, streamer = end_tokens(config.eos_token_id), None, request.streamer
    pad_token_id = None if config.pad_token_id in ends else config.pad_token_id
    check_finite(predictor.model.named_parameters(), "the model")
    prompts = PromptFormat(
        patch_size=predictor.patch_size,
        context=config.max_position_embeddings,
        start_token_id=predictor.start_token_id,
        pad_token_id=config.pad_token_id,
        alignment=request.prompt_alignment,
        max_new_tokens=request.max_new_tokens,
        max_length=request.max_length,
        truncate=request.truncate,
    ).apply(
        read_prompts(request.input_ids, request.attention_mask, config.vocab_size, pad_token_id)
    )
    if request.stop_strings is not None:
        stops = StopStrings(request.stop_strings, request.tokenizer)
    if streamer is not None and len(prompts) > 1:
        raise UserError(f"a streamer shows one sequence, got {len(prompts)} prompts")
    padding = _padding(config, prompts, may_end=bool(ends or stops))
    seeds = sequence_seeds(request.seed, len(prompts), device)
    is_pad = request.prompt_alignment == "pad"
    transcript = Transcript(
        prompts,
        ends=ends,
        keeps_tail=is_pad,
        stops=stops,
        streamer=streamer,
    )
    with torch.inference_mode():  # operations cost less than under no_grad
        times = _run(predictor, transcript, seeds, is_watched=bool(streamer or stops))
    return assemble(transcript, times, padding=padding, moves_padding=is_pad, device=device)


@torch.no_grad()
def prepare(predictor: Predictor, *, batch_size: int, max_length: int) -> float:
    """Capture the step for texts of up to `max_length` tokens; the seconds it took.

    Nothing is captured without a GPU, or for a method without fixed shapes.
    """
    begin = time.perf_counter()
    if _is_captured(predictor):
        chunks = -(-max_length // predictor.patch_size) + 2  # a start chunk, one with padding
        captured_step(predictor, batch_size=batch_size, capacity=chunks, is_reserved=True)
    return time.perf_counter() - begin


def _run(predictor: Predictor, transcript: Transcript, seeds: Tensor, *, is_watched: bool) -> Times:
    """Fill the transcript; if `is_watched`, after every step, for a streamer or stop strings."""
    times, size, prompts = Times(), predictor.patch_size, transcript.prompts
    num_chunks = max(_new_chunks(prompt, size) for prompt in prompts)
    longest = max(len(prompt.chunks) for prompt in prompts) // size
    batch_size, capacity = len(prompts), longest + num_chunks
    begin, captured = time.perf_counter(), None
    if _is_captured(predictor):
        captured = captured_step(predictor, batch_size=batch_size, capacity=capacity)
        state = captured.state
    else:
        state = DecodeState.allocate(predictor, batch_size=batch_size, capacity=capacity)
    times.warmup = time.perf_counter() - begin
    begin = time.perf_counter()
    hidden = read(state, prompts, seeds)
    if seeds.is_cuda:
        torch.cuda.synchronize(seeds.device)
    times.prefill = time.perf_counter() - begin
    begin = time.perf_counter()
    first = draw_first(state, hidden, prompts)
    steps_per_sync = STEPS_PER_SYNC if captured is not None and not is_watched else 1
    _fill_transcript(transcript, state, captured, first, num_chunks, steps_per_sync)
    times.decode = time.perf_counter() - begin
    return times


def read(state: DecodeState, prompts: Sequence[Prompt], seeds: Tensor) -> Tensor:
    """Read the whole chunks of prompts; seeds are int64 ``[B, 2]``. Hidden states ``[B, H]``."""
    chunks = [prompt.chunks for prompt in prompts]
    lengths = [len(row) // state.predictor.patch_size for row in chunks]
    return prefill(state, left_aligned(chunks, fill=0).to(seeds.device), lengths, seeds)


def draw_first(state: DecodeState, hidden: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """The first new chunks, packed, given what the prompts begin of them."""
    given = [prompt.given for prompt in prompts]
    fill = state.predictor.model.config.pad_token_id or 0  # where no draw continues the prompt
    ids = left_aligned(given, fill=fill, width=state.predictor.patch_size).to(hidden.device)
    return first_chunk(state, hidden, ids, [len(tokens) for tokens in given])


def _fill_transcript(
    transcript: Transcript,
    state: DecodeState,
    captured: CapturedStep | None,
    first: Tensor,
    num_chunks: int,
    steps_per_sync: int,
) -> None:
    """Step until every sequence has ended, at the latest after `num_chunks` of them."""
    rows = list(range(len(transcript.prompts)))  # sequences that the state holds
    unread, num_steps = [first], 1
    while True:
        if len(unread) == steps_per_sync or num_steps == num_chunks:
            for records in read_records(unread):
                for row, record in zip(rows, records, strict=True):
                    transcript.append(row, record)
            unread = []
            if transcript.is_complete:
                return
            if captured is None:
                state, rows = _without_ended(state, rows, transcript)
        unread.append(decode_step(state) if captured is None else captured.replay())
        num_steps += 1


def _without_ended(
    state: DecodeState, rows: list[int], transcript: Transcript
) -> tuple[DecodeState, list[int]]:
    """Drop ended sequences once half of them have ended: not earlier, as this copies the cache."""
    live = [index for index, row in enumerate(rows) if not transcript.has_ended[row]]
    if 2 * len(live) > len(rows):
        return state, rows
    return state.select(live), [rows[index] for index in live]


def _is_captured(predictor: Predictor) -> bool:
    return predictor.is_capturable and predictor.model.device.type == "cuda"


def _new_chunks(prompt: Prompt, size: int) -> int:
    """Chunks to generate at most; one more where the first may have to be filled with padding."""
    return -(-(len(prompt.given) + prompt.budget) // size) + bool(prompt.given)


def _padding(config: Any, prompts: list[Prompt], *, may_end: bool) -> int | None:
    """What follows a sequence's end: the pad token, or the (first) end token in its place."""
    ends = end_tokens(config.eos_token_id)
    padding = config.pad_token_id if config.pad_token_id is not None else next(iter(ends), None)
    lengths = {len(prompt.tokens) + prompt.budget for prompt in prompts}
    if padding is None and (len(lengths) > 1 or (may_end and len(prompts) > 1)):
        raise UserError(
            "sequences of this batch may end at different places, but config.pad_token_id and "
            "config.eos_token_id are None; set one, or generate one at a time"
        )
    return padding
