"""What a client is told, in OpenAI's forms. Knows names of fields; nothing of where the values come from."""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Usage:
    """Tokens of a request: those of its prompts, how many of them were read before, and those of its replies."""

    prompt: int
    cached: int
    new: int

    def content(self) -> dict[str, Any]:
        """As OpenAI counts."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.new,
            "total_tokens": self.prompt + self.new,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Form:
    """The replies to one request. chat: with turns of a conversation, else as a plain text's completion."""

    def __init__(self, model: str, chat: bool) -> None:
        self.chat = chat
        self._common = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, texts: Sequence[str], reasons: Sequence[str], usage: Usage) -> dict[str, Any]:
        """All replies together."""
        choices = []
        for index, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
            said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": reason})
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._common, "object": kind, "choices": choices, "usage": usage.content()}

    def role(self, index: int) -> bytes:
        """The chunk that opens a reply of a conversation."""
        return self._chunk([{"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])

    def piece(self, index: int, text: str) -> bytes:
        """A chunk with more text."""
        said = {"delta": {"content": text}} if self.chat else {"text": text}
        return self._chunk([{"index": index, **said, "logprobs": None, "finish_reason": None}])

    def finish(self, index: int, reason: str) -> bytes:
        """The chunk that closes a reply."""
        said: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        return self._chunk([{"index": index, **said, "logprobs": None, "finish_reason": reason}])

    def usage(self, usage: Usage) -> bytes:
        """The chunk that tells of all tokens."""
        return self._chunk([], usage=usage.content())

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return event({**self._common, "object": kind, "choices": choices, **more})


class Trimmed:
    """The text of a turn without white space at its ends, piece by piece: what may be its end is held back."""

    def __init__(self) -> None:
        self._begun, self._held = False, ""

    def add(self, text: str) -> str:
        """What may be shown, now that `text` has been added."""
        text = self._held + text
        text = text if self._begun else text.lstrip()
        shown = text.rstrip()
        self._begun, self._held = self._begun or bool(shown), text[len(shown) :]
        return shown


def event(content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content).encode("ascii") + b"\n\n"


def embeddings(model: str, vectors: np.ndarray, tokens: int, as_base64: bool) -> dict[str, Any]:
    """vectors: (N, D) float32; in base64 they are little-endian."""
    rows = [base64.b64encode(row.astype("<f4").tobytes()).decode() if as_base64 else row.tolist() for row in vectors]
    data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
    return {"object": "list", "data": data, "model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


def model_card(model: str, created: int) -> dict[str, Any]:
    """One line of /v1/models."""
    return {"id": model, "object": "model", "created": created, "owned_by": "vlm"}
