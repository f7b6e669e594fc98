"""Requests as OpenAI's clients send them, and what of them this server can serve.

Numbers, types and names are checked here, without a model; what depends on it in
`calm.serving.models`.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from calm.serving.errors import bad_request

__all__ = [
    "NEUTRAL",
    "ChatRequest",
    "CompletionRequest",
    "Message",
    "SamplingFields",
    "TextRequest",
    "check_others",
]


def _whole(text: str) -> str:
    """JSON can name half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"no text: {error}") from None
    return text


Characters = Annotated[str, AfterValidator(_whole)]
Text = Annotated[str, Field(min_length=1), AfterValidator(_whole)]
Ids = Annotated[list[int], Field(min_length=1)]
MAX_CHOICES = 128
MAX_STOPS = 16
MAX_CANDIDATES = 100


class _Strict(BaseModel):
    """No conversion of types, and no name that is not known."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class SamplingFields(_Strict):
    """The field ``calm`` of a request: how chunks are chosen, as in `calm.decoding.generate`."""

    method: (
        Literal["batch", "exact", "medoid", "noise_scale", "amortized", "direct", "readout"] | None
    ) = None
    num_samples: int | None = Field(default=None, ge=1)
    noise_scale: float | None = Field(default=None, ge=0)
    max_draws: int | None = Field(default=None, ge=1)
    candidates: int | None = Field(default=None, ge=1, le=MAX_CANDIDATES)  # shown, of each vote


class StreamOptions(_Strict):
    """What a stream holds beside the text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # never done here


class TextRequest(_Strict):
    """What both kinds of request have. Other names are checked by `check_others`."""

    model_config = ConfigDict(extra="allow")

    model: str
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(default=None, ge=0)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    calm: SamplingFields | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings, possibly none."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def candidates(self) -> int | None:
        """Candidates of each vote that the reply shows; None for a reply without votes."""
        return None if self.calm is None else self.calm.candidates


class CompletionRequest(TextRequest):
    """The body of ``/v1/completions``."""

    prompt: Characters | Ids | Annotated[list[Characters] | list[Ids], Field(min_length=1)]
    max_tokens: int | None = Field(default=None, ge=1)


class ContentPart(_Strict):
    """A part of a message; text alone is read."""

    type: Literal["text"]
    text: Characters


class Message(BaseModel):
    """One message of a conversation; other fields are for the chat template."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: Characters | list[ContentPart] | None = None


class ChatRequest(TextRequest):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)


# Other arguments -> their neutral values, which clients send by habit, and why no other is served.
_NO_PENALTIES = "the sampling methods of this server do not depend on how often a token occurred"
_NO_TOOLS = "this server calls no tools"
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "top_p": ((1,), "{why}"),
    "top_k": ((0, -1), "{why}"),
    "min_p": ((0,), "{why}"),
    "logprobs": ((False,), "{why}"),
    "top_logprobs": ((0,), "{why}"),
    "logit_bias": (({},), "{why}"),
    "presence_penalty": ((0,), _NO_PENALTIES),
    "frequency_penalty": ((0,), _NO_PENALTIES),
    "repetition_penalty": ((1,), _NO_PENALTIES),
    "best_of": ((1,), "texts are not ranked by a likelihood; use n"),
    "echo": ((False,), "the prompt is not repeated"),
    "suffix": (("",), "text is continued, not filled in"),
    "tools": (([],), _NO_TOOLS),
    "functions": (([],), _NO_TOOLS),
    "tool_choice": (("none", "auto"), _NO_TOOLS),
    "response_format": (({"type": "text"},), "text follows no schema"),
    "store": ((False,), "nothing is stored"),
}
# Of any value: they say nothing about the text.
IGNORED = ("user", "metadata", "service_tier", "safety_identifier", "parallel_tool_calls")


def check_others(request: TextRequest, why: str) -> None:
    """Accept neutral values of arguments that are not served.

    Args:
        request: any.
        why: the model has no probabilities of tokens that these arguments could be about.

    Raises:
        APIError: an unknown argument, or another value.
    """
    for name, value in (request.model_extra or {}).items():
        if name in IGNORED or (name in NEUTRAL and value is None):
            continue
        if name not in NEUTRAL:
            raise bad_request(name, f"unknown argument {name}", "unknown_parameter")
        values, reason = NEUTRAL[name]
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool)
                   for one in values):  # fmt: skip
            allowed = " or ".join(map(repr, values))
            reason = reason.format(why=why)
            raise bad_request(name, f"{name} must be {allowed}: {reason}", "unsupported_value")
