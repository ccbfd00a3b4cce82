"""From what a client asked to what the engine takes. Knows conversations, pictures, tokens; nothing of HTTP, queues or threads.

Everything here takes its time and belongs off the event loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from vlm.api import VLM
from vlm.errors import UsageError
from vlm.generation.decoding import Decoding
from vlm.generation.request import Prompt

from .limits import Limits
from .pictures import picture_bytes
from .refusals import Refusal
from .requests import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    ImagePart,
    Message,
    Sampling,
    TextPart,
)
from .worker import Job

CHARACTERS = 16  # a token; no text comes longer, and what is longer would be slow to find too long


class Prompts:
    """Makes what is asked of one model ready. length: tokens that a row holds, prompt and reply together."""

    def __init__(self, vlm: VLM, limits: Limits, length: int) -> None:
        self._vlm, self._limits, self._length = vlm, limits, length

    @property
    def characters(self) -> int:
        """The most text that a request may hold."""
        return CHARACTERS * self._length

    def chat(self, request: ChatRequest) -> list[Job]:
        """A prompt for each reply that is asked for. Raises Refusal (400)."""
        try:
            prompt = self._vlm.prompt(self._conversation(request.messages))
        except (UsageError, TemplateError) as error:
            raise Refusal(400, f"messages: {error}", param="messages", code="invalid_value") from None
        return self._jobs(request, prompt, request.new_tokens, None)

    def completion(self, request: CompletionRequest) -> list[Job]:
        """As `chat`; the replies to the first prompt come first."""
        prompts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        self._check_characters("prompt", sum(map(len, prompts)))
        jobs = []
        for text in prompts:
            try:
                prompt = self._vlm.text_prompt(text)
            except UsageError as error:
                raise Refusal(400, f"prompt: {error}", param="prompt", code="invalid_value") from None
            jobs += self._jobs(request, prompt, request.max_tokens, 16)
        return jobs

    def embedding(self, request: EmbeddingRequest) -> tuple[list[str | bytes], int]:
        """What is to be embedded, text or encoded picture, and its tokens in all. Raises Refusal (400)."""
        given = request.input if isinstance(request.input, list) else [request.input]
        if len(given) > self._limits.inputs:
            told = f"input: {len(given)} inputs, the limit is {self._limits.inputs}; ask for less at once"
            raise Refusal(400, told, param="input", code="invalid_value")
        dimensions = self._vlm.model.config.embedding_dim
        if request.dimensions not in (None, dimensions):
            told = f"dimensions: {request.dimensions} asked for and the model has {dimensions}; leave it out"
            raise Refusal(400, told, param="dimensions", code="invalid_value")
        items: list[str | bytes] = []
        for place, part in enumerate(given):
            if isinstance(part, ImagePart):
                self._check_pictures("input", sum(isinstance(item, bytes) for item in items) + 1)
                items.append(self._picture(part, f"input.{place}"))
            else:
                items.append(part.text if isinstance(part, TextPart) else part)
        texts = [item for item in items if isinstance(item, str)]
        self._check_characters("input", sum(map(len, texts)))
        return items, sum(self._text_tokens(text) for text in texts)

    # Beneath

    def _jobs(self, request: Sampling, prompt: Prompt, asked: int | None, default: int | None) -> list[Job]:
        room = self._length - len(prompt.ids)
        if (asked or 1) > room:
            told = (
                f"the prompt has {len(prompt.ids)} tokens and {asked or 1} more are asked for; the limit for both is "
            )
            param = "messages" if isinstance(request, ChatRequest) else "prompt"
            raise Refusal(400, f"{told}{self._length}, ask for less", param=param, code="context_length_exceeded")
        new_tokens = asked or min(default or room, room)
        prompt.picture_keys  # noqa: B018  takes its time, and is kept
        return [(prompt, decoding_of(request, new_tokens, choice)) for choice in range(request.n or 1)]

    def _conversation(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages in `VLM.generate`'s form."""
        told, pictures, characters = [], 0, 0
        for index, message in enumerate(messages):
            parts = (
                [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
            )
            content = []
            for place, part in enumerate(parts):
                if isinstance(part, ImagePart):
                    pictures += 1
                    self._check_pictures("messages", pictures)
                    picture = self._picture(part, f"messages.{index}.content.{place}")
                    content.append({"type": "image", "image": picture})
                else:
                    characters += len(part.text)
                    content.append({"type": "text", "text": part.text})
            told.append({"role": "system" if message.role == "developer" else message.role, "content": content})
        self._check_characters("messages", characters)
        return told

    def _picture(self, part: ImagePart, param: str) -> bytes:
        return picture_bytes(part.image_url.url, max_pixels=self._limits.pixels, param=f"{param}.image_url.url")

    def _check_pictures(self, param: str, count: int) -> None:
        if count > self._limits.images:
            told = f"{param}: more than {self._limits.images} pictures; send less"
            raise Refusal(400, told, param=param, code="too_many_images")

    def _check_characters(self, param: str, count: int) -> None:
        if count > self.characters:
            told = f"{param}: {count} characters, and {self._length} tokens are never more than {self.characters}; shorten it"
            raise Refusal(400, told, param=param, code="context_length_exceeded")

    def _text_tokens(self, text: str) -> int:
        """Tokens of a text to be embedded, its end included."""
        if not text.strip():
            raise Refusal(400, "input: a text is empty; write at least one word", param="input", code="invalid_value")
        processor = self._vlm.processor
        tokens = len(processor.tokenizer.encode(processor.plain(text), add_special_tokens=False)) + 1
        if tokens > self._length:
            told = f"input: a text has {tokens} tokens, the limit is {self._length}; shorten it"
            raise Refusal(400, told, param="input", code="context_length_exceeded")
        return tokens


def decoding_of(request: Sampling, new_tokens: int, choice: int) -> Decoding:
    """The settings of one of a request's replies: each draws its own random numbers, and with a seed always the same."""
    temperature = 1.0 if request.temperature is None else request.temperature
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    sampling: dict[str, Any] = {}
    if temperature > 0:
        sampling = {
            "temperature": temperature,
            "top_k": request.top_k if request.top_k and request.top_k > 0 else None,
            "top_p": request.top_p if request.top_p and request.top_p < 1 else None,
            "min_p": request.min_p or None,
        }
    return Decoding(
        max_new_tokens=new_tokens,
        repetition_penalty=request.repetition_penalty or 1.0,
        stop=tuple(stop),
        seed=None if request.seed is None else request.seed + choice,
        **sampling,
    )
