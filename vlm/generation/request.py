"""A request and the reply in the making.

Knows tokens, pictures' pixels and settings. Knows nothing of models or of the batch that a request is part of.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .beams import BeamSearch, Hypothesis
from .choosing import Chooser
from .decoding import Decoding
from .text import ReplyText, text_of


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

    most: new tokens at most. tokens: new ones so far, without the one that ends it. finish_reason: None while it goes on;
    "stop" (its end was said, or a stop string), "length" (no more tokens were asked for, or there is no room) or "cancelled".
    reused: prompt tokens that had not to be read again. log_probability: natural, of all that was said.
    summed: how many tokens that is of, the end too if it was said.
    search: where there are beams. Nothing can be shown until it is over, for any of them may be the reply.
    """

    prompt: Prompt
    decoding: Decoding
    tokenizer: PreTrainedTokenizerBase
    most: int
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    reused: int = 0
    log_probability: float = 0.0
    summed: int = 0
    search: BeamSearch | None = None

    def __post_init__(self) -> None:
        self._text = ReplyText(self.tokenizer, self.prompt.before, self.decoding.stop)
        self._taken = 0
        self.chooser = Chooser(self.decoding)
        if self.decoding.num_beams > 1:
            self.search = BeamSearch(self.decoding, self.most, self._text if self.decoding.stop else None)

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

    def best(self, n: int) -> list[tuple[float, str]]:
        """What it is worth and its text, of a reply that has ended; of the `n` best hypotheses, the best first, if searched.

        A reply that was not searched is worth the mean of its tokens' log-probabilities.
        """
        if self.search is None:
            return [(self.log_probability / max(1, self.summed), self.text)]
        before, stop = self.prompt.before, self.decoding.stop
        return [(one.score, text_of(self.tokenizer, one.tokens, before, stop)) for one in self.search.hypotheses[:n]]

    def add(self, token: int, log_probability: float, ends: bool) -> None:
        """The next token; `ends` says that it ends the reply."""
        self.log_probability, self.summed = self.log_probability + log_probability, self.summed + 1
        if ends:
            self.end("stop")
            return
        self.tokens.append(token)
        self._text.add(token)
        if self._text.stopped:
            self.end("stop")
        elif len(self.tokens) >= self.most:
            self.end("length")

    def settle(self, reply: Hypothesis) -> None:
        """The search is over, and this is what it found."""
        self.tokens, self.log_probability = reply.tokens, reply.log_probability
        for token in reply.tokens:
            self._text.add(token)
        self.end(reply.finish_reason)

    def end(self, reason: str) -> None:
        """No token comes any more."""
        self.finish_reason = reason
        self._text.end()
        if self._text.stopped and reason == "length":
            self.finish_reason = "stop"
