"""Generation: one backbone step, a few head draws and one choice for every K tokens.

Prompts are read once. Afterwards the KV cache, which counts chunks, grows by one with each step. A
chunk enters the backbone as tokens, never as the latent that it was decoded from. The step is in
`calm.decoding.engine.decode_step`, the choice of a chunk in `calm.decoding.sampling.methods`, the
loop in `calm.decoding.loop`.
"""

import math
from collections.abc import Sequence
from typing import Any, TypedDict, Unpack

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from calm.decoding.engine.predictors import Predictor
from calm.decoding.loop import Request, continue_prompts, prepare
from calm.decoding.sampling.methods import READOUT, build_method
from calm.decoding.text.prompt import Prompts
from calm.decoding.text.result import Generation
from calm.errors import UserError
from calm_kernels.autograd import without_autocast
from calm_kernels.noise import Seed

__all__ = ["Sampling", "generate", "make_predictor", "warmup"]


class Sampling(TypedDict, total=False):
    """The arguments of `generate` that say how a chunk is chosen."""

    method: str
    temperature: float
    num_samples: int
    noise_scale: float
    max_draws: int | None


def generate(
    model: Any,
    input_ids: Prompts,
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
    stop_strings: str | list[str] | None = None,
    tokenizer: Any = None,
    truncate: bool = False,
    seed: Seed | Sequence[int] = None,
    streamer: BaseStreamer | None = None,
    return_details: bool = False,
) -> Tensor | Generation:
    """Continue prompts of any lengths, K tokens at a time.

    A sequence ends with its end token, with a stop string or at the length asked for; the rest of
    its row is padding. A sequence depends on the others of the batch through its seed alone. (In 16
    bits a matmul over another batch rounds differently, which may change a text.) The model runs in
    the dtype of its weights, with or without autocast. It is read as it is at the call: no weight
    is copied. On a GPU it keeps captured decode steps, see `calm.decoding.engine.cuda_graph`.

    Args:
        model: a CALM with any head, or the token-by-token baseline, whose chunk is one token. The
            baseline knows its probabilities: there every method samples from softmax(logits / T),
            with one draw.
        input_ids: int64 ``[B, T]``, or a list of B prompts: lists of ids or 1-d tensors. A model
            with a start chunk (`has_start_patch`) takes empty ones.
        attention_mask: ``[B, T]``, 0 for a tensor's padding on the left or on the right.
        max_new_tokens: tokens to add at most.
        max_length: tokens of prompt and continuation; pass this or `max_new_tokens`.
        temperature: T in (0, 1]; 1 samples the model, below it chunks are chosen by `method`. Any
            T >= 0 for ``readout``; 0 takes the likeliest token.
        num_samples: N, candidates for each chunk; with more of them ``batch`` is closer to P^(1/T).
        method: ``batch`` (Algorithm 2), ``exact`` (Algorithm 1), ``medoid``, ``noise_scale`` or
            ``direct`` (T = 1 alone), see `calm.decoding.sampling.methods`. ``amortized`` needs a
            model whose head has learned T (`calm distill-temperature`), in the range that it was
            trained for, or 1, which is the model as it is. ``readout`` needs a model that has kept
            its readout (`calm.models.readout`): the chunk's tokens are drawn one after the other
            from softmax(logits / T), and its head is not used.
        noise_scale: factor on the head's noise, for every method; 0 is deterministic.
        prompt_alignment: how prompt tokens that fill no whole chunk are treated. ``condition``
            draws the first chunk given them. Where no draw within the cap begins with them, the
            chunk is filled with pad tokens, which are not part of the result, and the text goes on
            after it. ``pad`` always fills it, as published: pad tokens count towards `max_length`,
            the result may exceed `max_length` by up to K - 1 tokens, tokens after an end token in
            its chunk are kept, and at the end all pad tokens move to the end of their row.
        max_draws: head draws that a chunk may take, by default 25 N, see `build_method`.
        stop_strings: one or more strings that end a text when they appear in its new part.
        tokenizer: decodes the text for `stop_strings`.
        truncate: drop the beginning of a prompt that is too long instead of raising; a truncated
            prompt gets no start chunk.
        seed: an int; or one int for each sequence, whose text then does not depend on its place in
            the batch; None takes one from torch's default generator.
        streamer: receives the prompt, then the tokens of each chunk; for one prompt. `TextStream`
            prints them with every space, which `transformers.TextStreamer` drops after a line
            break. It is ended whatever happens.
        return_details: return a `Generation`.

    Returns: prompts and continuations, ``[B, T']``, or a `Generation`.
    Raises:
        UserError: an argument out of range, ids beyond the vocabulary, no room in the context,
            weights or latents that are not finite.
    Source: paper, section 3.3.3 and Algorithms 1 and 2.
    """
    sampling: Sampling = {
        "method": method,
        "temperature": temperature,
        "num_samples": num_samples,
        "noise_scale": noise_scale,
        "max_draws": max_draws,
    }
    request = Request(
        input_ids=input_ids,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        prompt_alignment=prompt_alignment,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
        truncate=truncate,
        seed=seed,
        streamer=streamer,
    )
    try:
        predictor = make_predictor(model, **sampling)
        with without_autocast(predictor.backbone.norm.weight):
            generation = continue_prompts(predictor, request)
    finally:  # a streamer may be waited for, and after Ctrl-C it shows what was generated
        if streamer is not None:
            streamer.end()
    return generation if return_details else generation.sequences


def warmup(
    model: Any, *, batch_size: int = 1, max_length: int, **sampling: Unpack[Sampling]
) -> float:
    """Compile and capture what `generate` will run, so that its first call is as fast as others.

    Args:
        model: as in `generate`.
        batch_size: B, prompts of a call.
        max_length: tokens of prompt and continuation; the captured step serves all calls that
            need no more.
        **sampling: how a chunk is chosen, as in `generate`.

    Returns: the seconds it took. Without a GPU, or for ``exact``, nothing is captured.
    """
    predictor = make_predictor(model, **sampling)
    with without_autocast(predictor.backbone.norm.weight):
        return prepare(predictor, batch_size=batch_size, max_length=max_length)


def make_predictor(model: Any, **sampling: Unpack[Sampling]) -> Predictor:
    """How the next chunk of `model` is chosen.

    Args:
        model: as in `generate`.
        **sampling: likewise.

    Raises:
        UserError: an argument out of range, or another kind of model.
    """
    if not hasattr(model, "make_predictor"):
        raise UserError(f"model must be a CALM or the token baseline, got {type(model).__name__}")
    temperature = sampling.get("temperature", 0.5)
    if sampling.get("method") != READOUT:
        return model.make_predictor(build_method(**sampling), temperature)
    if not 0.0 <= temperature < math.inf:
        raise UserError(f"temperature must be finite and at least 0, got {temperature}")
    if sampling.get("noise_scale", 1.0) != 1:
        raise UserError(
            f"noise_scale must be 1 for method 'readout', which does not use the head; got "
            f"{sampling['noise_scale']}"
        )
    return model.make_token_predictor(temperature)
