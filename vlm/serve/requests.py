"""What may be asked of the server: OpenAI's requests, as far as they are supported, and what vLLM adds to them.

Knows names, types and ranges. Knows nothing of models or pictures. A field that is not here is refused, for a client that is
silently not given what it asked for is worse off than one that is told. What is wrong with a request is told without what
it contains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import ErrorDetails, from_json

from .refusals import Refusal

LONGEST_NAME = 100  # characters shown of a field's name
LARGEST_SEED = 2**63 - 1


class Strict(BaseModel):
    """Takes what it names, as the type it names."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class ImageURL(Strict):
    """Where a picture is: a data URL."""

    url: str = Field(description="data:image/…;base64,…; addresses are not fetched")
    detail: Literal["auto", "low", "high"] | None = Field(
        None, description="taken and of no effect: a model has one size"
    )


class ImagePart(Strict):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageURL


class TextPart(Strict):
    """A piece of text."""

    type: Literal["text"]
    text: str


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class UserMessage(Strict):
    """What a person says and shows."""

    role: Literal["user"]
    content: str | list[Part]


class SystemMessage(Strict):
    """What the assistant is told to be."""

    role: Literal["system", "developer"]
    content: str | list[TextPart]


class AssistantMessage(Strict):
    """What the assistant said before. The rest is what OpenAI's client writes of a reply that it gives back."""

    role: Literal["assistant"]
    content: str | list[TextPart]
    refusal: None = Field(None, description="only null")
    annotations: None = Field(None, description="only null")
    audio: None = Field(None, description="only null")
    function_call: None = Field(None, description="only null")
    tool_calls: None = Field(None, description="only null")


Message = Annotated[UserMessage | SystemMessage | AssistantMessage, Field(discriminator="role")]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class StreamOptions(Strict):
    """How a stream ends."""

    include_usage: bool | None = None


class Sampling(Strict):
    """What chat and completion share. Defaults are OpenAI's; top_k, min_p and repetition_penalty are vLLM's."""

    model: str | None = Field(None, description="the name that /v1/models lists")
    temperature: float | None = Field(None, ge=0, le=2, description="default 1; 0 takes the likeliest token")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1, description="-1 and 0: all tokens")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    seed: int | None = Field(None, ge=-LARGEST_SEED - 1, le=LARGEST_SEED)
    n: int | None = Field(None, ge=1, le=128)
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="taken and of no effect")
    presence_penalty: Literal[0] | None = Field(None, description="only 0")
    frequency_penalty: Literal[0] | None = Field(None, description="only 0")


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Literal[False] | None = Field(None, description="only false")

    @property
    def new_tokens(self) -> int | None:
        """The longest reply that was asked for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=128)]
    max_tokens: int | None = Field(None, ge=1, description="default 16")
    echo: Literal[False] | None = Field(None, description="only false")


class EmbeddingRequest(Strict):
    """POST /v1/embeddings: vectors of unit length, of texts and of pictures, in one space."""

    model: str | None = Field(None, description="the name that /v1/models lists")
    input: str | Annotated[list[str | Part], Field(min_length=1)] = Field(description="texts; parts as in chat")
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, description="only the model's own")
    user: str | None = Field(None, description="taken and of no effect")


Asked = TypeVar("Asked", bound=Strict)


def read_request(body: bytes, kind: type[Asked], most_marks: int) -> Asked:
    """Bytes of JSON -> a request. Raises Refusal (400).

    most_marks: how many of `,`, `[` and `{` there may be. A byte of them makes an object of fifty, so that they are
    counted before they are read.
    """
    marks = sum(body.count(mark) for mark in (b",", b"[", b"{"))
    if marks > most_marks:
        raise Refusal(400, f"the body has {marks} commas and brackets, the limit is {most_marks}; ask for less at once")
    try:
        told = from_json(body, allow_inf_nan=False, cache_strings="keys")  # no text stays when its request has gone
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None
    if not isinstance(told, dict):
        raise Refusal(400, "the body is not a JSON object; write {…}")
    try:
        return kind.model_validate(told)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=True, include_input=False)[0]
        raise _refusal(fault, told) from None


def _refusal(fault: ErrorDetails, told: Mapping[str, Any]) -> Refusal:
    # pydantic puts the names of the alternatives of a union into the place, and a client knows none of them.
    place = ".".join(_shown(part) for part in _place(fault["loc"], told, fault["type"] == "missing"))
    context = fault.get("ctx") or {}
    if fault["type"] == "extra_forbidden":
        return Refusal(400, f"{place}: unknown or unsupported; leave it out", param=place, code="unknown_parameter")
    if fault["type"] == "missing":
        return Refusal(400, f"{place}: missing; give it", param=place, code="missing_required_parameter")
    if fault["type"] == "union_tag_invalid":
        wanted = f"{context['discriminator']} must be one of {context['expected_tags']}"
        return Refusal(400, f"{place}: {wanted}", param=place, code="invalid_value")
    return Refusal(400, f"{place}: {fault['msg'][0].lower()}{fault['msg'][1:]}", param=place, code="invalid_value")


def _place(location: tuple[int | str, ...], told: Any, missing: bool) -> list[int | str]:
    """The names in `location` that lead somewhere in what was told, and the last of them where it is what is missing."""
    kept: list[int | str] = []
    for depth, part in enumerate(location, 1):
        if isinstance(told, dict) and isinstance(part, str):
            if part in told:
                told = told[part]
            elif not missing or depth < len(location):
                continue
            kept.append(part)
        elif isinstance(told, list) and isinstance(part, int):
            kept.append(part)
            told = told[part] if part < len(told) else None
    return kept


def _shown(part: int | str) -> str:
    text = str(part)
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…"
