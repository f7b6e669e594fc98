"""A model that is served: from a request to the texts that it asks for."""

import copy
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from jinja2 import TemplateError

from calm.data.encoding import Encoder
from calm.decoding.engine.predictors import Predictor
from calm.decoding.generation import Sampling, make_predictor
from calm.decoding.sampling.methods import MAX_WAVES, READOUT
from calm.decoding.sampling.seeds import sequence_seeds
from calm.decoding.slots import SlotBatch
from calm.decoding.text.prompt import Prompt, PromptFormat, read_prompts
from calm.decoding.text.stopping import end_tokens
from calm.errors import UserError
from calm.serving.errors import bad_request
from calm.serving.schema import (
    ChatRequest,
    CompletionRequest,
    SamplingFields,
    TextRequest,
    check_others,
)
from calm.serving.texts import Piece, WrittenText
from calm.serving.votes import VoteWatch
from calm.serving.worker import Lane

__all__ = ["Limits", "ServedModel", "Settings"]

MAX_SHOWN = 500  # candidates of a vote times texts of a request
SEED_BITS = 53  # whole numbers that every reader of JSON keeps
WHY_CALM = (
    "a CALM draws latents and knows no probabilities of tokens; temperature below 1 sharpens its "
    "distribution by a vote among draws"
)
WHY_TOKENS = "tokens are drawn from softmax(logits / T) as it is"

Send = Callable[[int, Piece | Exception], None]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server takes at a time.

    Attributes:
        num_slots: texts of a model that are written at once.
        max_waiting: texts that wait beside them.
        context: tokens of prompt and text at most; None takes what the model can read.
        max_num_samples: candidates of a chunk that a request may ask for.
    """

    num_slots: int = 8
    max_waiting: int = 64
    context: int | None = None
    max_num_samples: int = 1000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a text is sampled: what a reply names under ``calm``."""

    method: str
    temperature: float
    num_samples: int
    noise_scale: float
    max_draws: int | None
    seed: int


@dataclass
class ServedModel:
    """A model, its tokenizer and its lane.

    Args:
        name: what requests call it.
        model: a CALM or the token baseline, in evaluation mode.
        tokenizer: of the model.
        limits: of the server.
        method: of requests that name none.
        num_samples: likewise.
    """

    name: str
    model: Any
    tokenizer: Any
    limits: Limits = field(default_factory=Limits)
    method: str = "batch"
    num_samples: int = 200

    def __post_init__(self) -> None:
        self.created = int(time.time())
        self.is_calm = hasattr(self.model.config, "noise_size")
        predictor = self._predictor(
            Settings(
                method=self.method if self.is_calm else READOUT, temperature=1.0,
                num_samples=self.num_samples,
                noise_scale=1.0, max_draws=None, seed=0,
            )
        )  # fmt: skip
        self.patch_size, self.start_token_id = predictor.patch_size, predictor.start_token_id
        self.chunks: int = self.model.config.max_position_embeddings
        if self.limits.context is not None:
            self.chunks = min(self.chunks, -(-self.limits.context // self.patch_size))
        # A prompt is encoded in another thread than tokens are decoded in.
        self._encoder = Encoder(copy.deepcopy(self.tokenizer))
        slots = SlotBatch(predictor, num_slots=self.limits.num_slots, capacity=self.chunks)
        self.lane = Lane(
            slots, num_slots=self.limits.num_slots, max_waiting=self.limits.max_waiting
        )

    @property
    def context(self) -> int:
        """Tokens of prompt and text at most."""
        return self.patch_size * (self.chunks - (self.start_token_id is not None))

    def settings(self, request: TextRequest) -> Settings:
        """How the texts of a request are sampled.

        Raises:
            APIError: what this model cannot do.
        """
        asked = request.calm or SamplingFields()
        method = (asked.method or self.method) if self.is_calm else READOUT
        num_samples = asked.num_samples or self.num_samples
        noise_scale = 1.0 if asked.noise_scale is None else float(asked.noise_scale)
        temperature = 1.0 if request.temperature is None else float(request.temperature)
        draws_latents = method != READOUT
        check_others(request, WHY_CALM if draws_latents else WHY_TOKENS)
        if draws_latents and temperature > 1:
            raise bad_request(
                "temperature",
                f"temperature must lie in [0, 1] for a CALM, got {temperature:g}: 1 samples the "
                "model; its distribution is sharpened by draws that agree, and cannot be flattened "
                "without probabilities",
                "unsupported_value",
            )
        most = self.limits.max_num_samples
        for name, value, bound in (
            ("num_samples", num_samples, most),
            ("max_draws", asked.max_draws, MAX_WAVES * most),
        ):
            if value is not None and value > bound:
                raise bad_request("calm", f"calm.{name} must be at most {bound}, got {value}")
        if not draws_latents and noise_scale != 1:
            raise bad_request(
                "calm", f"calm.noise_scale must be 1 where tokens are drawn, got {noise_scale:g}"
            )
        return Settings(
            method=method,
            temperature=temperature,
            num_samples=num_samples,
            noise_scale=noise_scale,
            max_draws=asked.max_draws,
            seed=secrets.randbits(SEED_BITS) if request.seed is None else request.seed,
        )

    def completion_prompts(self, request: CompletionRequest) -> list[list[int]]:
        """The ids of each prompt of a request; `APIError` if it asks for too many texts."""
        prompt = request.prompt
        many: list[Any] = list(prompt)
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            many = [prompt]
        self.lane.check_size(len(many) * (request.n or 1))  # before anything is made for each
        return [self._encoder.prompt(p) if isinstance(p, str) else p for p in many]

    def chat_prompt(self, request: ChatRequest) -> list[int]:
        """The ids of a conversation, as the tokenizer's template writes it.

        Raises:
            APIError: the tokenizer has no template, or it refuses the conversation; too many texts
                are asked for.
        """
        self.lane.check_size(request.n or 1)
        tokenizer = self._encoder.tokenizer
        if not tokenizer.chat_template:
            raise bad_request(
                "messages",
                f"the tokenizer of {self.name} has no chat template; use /v1/completions, or save "
                "a tokenizer with a chat_template beside the model",
                "no_chat_template",
            )
        messages = [message.model_dump(exclude_none=True) for message in request.messages]
        for message in messages:
            if isinstance(message.get("content"), list):
                message["content"] = "".join(part["text"] for part in message["content"])
        try:
            text = str(
                tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            )
            text.encode("utf-8")  # a field of a message may hold half of a surrogate
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise bad_request(
                "messages", f"the chat template of {self.name} refuses the messages: {error}"
            ) from error
        return self._encoder.prompt(text)

    def texts(
        self,
        prompts: Sequence[list[int]],
        request: TextRequest,
        settings: Settings,
        max_tokens: int | None,
        send: Send,
    ) -> list[WrittenText]:
        """The texts that a request asks for: n of each prompt, one after the other.

        Text i has the seed of row i of `generate` with the request's seed.

        Args:
            prompts: ids of each.
            request: says when they end.
            settings: how they are sampled.
            max_tokens: of each text; None takes what the context has left.
            send: takes the number of a text and what it sends.

        Raises:
            APIError: no room in the context, ids beyond the vocabulary, a method that does not
                suit the model, too many candidates to show.
        """
        config, device = self.model.config, self.model.device
        count, shown = request.n or 1, request.candidates
        if shown is not None and shown * count * len(prompts) > MAX_SHOWN:
            raise bad_request(
                "calm",
                f"calm.candidates must be at most {MAX_SHOWN} over all texts, got {shown} for each "
                f"of {count * len(prompts)}",
            )
        try:
            predictor = self._predictor(settings)
        except UserError as error:
            raise bad_request("calm", str(error)) from error
        read = [self._prompt(ids, max_tokens) for ids in prompts]
        seeds = sequence_seeds(settings.seed, count * len(prompts), device)
        return [
            WrittenText(
                read[index // count],
                predictor,
                seeds[index : index + 1],
                ends=end_tokens(config.eos_token_id),
                stops=request.stops,
                tokenizer=self.tokenizer,
                send=partial(send, index),
                votes=None if shown is None else VoteWatch(shown, self.tokenizer),
            )
            for index in range(len(seeds))
        ]

    def _prompt(self, ids: list[int], max_tokens: int | None) -> Prompt:
        """A prompt as chunks, with its budget."""
        config = self.model.config
        used = len(ids) if self.start_token_id is not None else max(len(ids), self.patch_size)
        room = self.context - used
        if room < (max_tokens or 1):
            asked = "" if max_tokens is None else f", and max_tokens asks for {max_tokens} more"
            raise bad_request(
                "prompt",
                f"the context of {self.name} is {self.context} tokens; the prompt has {len(ids)}"
                f"{asked}",
                "context_length_exceeded",
            )
        layout = PromptFormat(
            patch_size=self.patch_size,
            context=self.chunks,
            start_token_id=self.start_token_id,
            pad_token_id=config.pad_token_id,
            alignment="condition",
            max_new_tokens=room if max_tokens is None else max_tokens,
            max_length=None,
            truncate=False,
        )
        try:
            (prompt,) = layout.apply(read_prompts([ids], None, config.vocab_size))
        except UserError as error:
            raise bad_request("prompt", str(error), "invalid_value") from error
        return prompt

    def _predictor(self, settings: Settings) -> Predictor:
        """The model with its sampling; at temperature 0 the likeliest token, or noise 0."""
        sampling: Sampling = {
            "method": settings.method,
            "temperature": settings.temperature,
            "num_samples": settings.num_samples,
            "noise_scale": settings.noise_scale,
            "max_draws": settings.max_draws,
        }
        if settings.temperature > 0 or settings.method == READOUT:
            return make_predictor(self.model, **sampling)
        sampling.update({"method": "direct", "temperature": 1.0, "noise_scale": 0.0})
        sampling.update({"num_samples": 1, "max_draws": 1})  # all draws of a chunk are equal
        return make_predictor(self.model, **sampling)
