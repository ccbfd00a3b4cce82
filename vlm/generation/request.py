"""A request and the reply in the making.

Knows tokens, pictures' pixels and settings. Knows nothing of models or of the batch that a request is part of.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .choosing import Chooser
from .decoding import Decoding
from .text import ReplyText


@dataclass(frozen=True)
class Prompt:
    """What a reply goes on from.

    ids: tokens, one `<image>` token for each picture. pixels: (n, 3, H, W) float32, normalised, or None.
    continues: the reply is written on from the prompt's last word, as a completion is; else it is a turn of its own.
    """

    ids: list[int]
    pixels: Tensor | None = None
    continues: bool = False

    @property
    def before(self) -> list[int]:
        """The tokens that the reply's text goes on from."""
        return self.ids if self.continues else []

    @cached_property
    def picture_keys(self) -> list[bytes]:
        """Equal for equal pictures."""
        if self.pixels is None:
            return []
        return [hashlib.sha256(picture.contiguous().numpy().data).digest() for picture in self.pixels]


@dataclass(eq=False)
class Generation:
    """One reply: what is there of it, and how it ended.

    tokens: new ones so far, without the one that ends it. finish_reason: None while it goes on; "stop" (its end was said, or a
    stop string), "length" (no more tokens were asked for, or there is no room) or "cancelled".
    reused: prompt tokens that had not to be read again. log_probability: natural, of all tokens and the end.
    """

    prompt: Prompt
    decoding: Decoding
    tokenizer: PreTrainedTokenizerBase
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    reused: int = 0
    log_probability: float = 0.0

    def __post_init__(self) -> None:
        self._text = ReplyText(self.tokenizer, self.prompt.before, self.decoding.stop)
        self._taken = 0
        self.chooser = Chooser(self.decoding)

    @property
    def text(self) -> str:
        """What may be shown so far: nothing of it changes any more."""
        return self._text.shown

    @property
    def said(self) -> list[int]:
        """All tokens, the prompt's too."""
        return self.prompt.ids + self.tokens

    def take(self) -> str:
        """The text that was added since the last call."""
        text = self.text[self._taken :]
        self._taken = len(self.text)
        return text

    def add(self, token: int, log_probability: float, ends: bool, room: int) -> None:
        """The next token; `ends` says that it ends the reply, `room` how many positions are left after it."""
        self.log_probability += log_probability
        if ends:
            self.end("stop")
            return
        self.tokens.append(token)
        self._text.add(token)
        if self._text.stopped:
            self.end("stop")
        elif len(self.tokens) >= self.decoding.max_new_tokens or room < 1:
            self.end("length")

    def end(self, reason: str) -> None:
        """No token comes any more."""
        self.finish_reason = reason
        self._text.end()
        if self._text.stopped and reason == "length":
            self.finish_reason = "stop"
