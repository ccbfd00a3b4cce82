"""A reply's text while its tokens come in: whole characters only, and nothing that may still become a stop string.

Knows tokens and strings. Knows nothing of models or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what a tokenizer writes for bytes that are no whole character yet
CONTEXT = 6  # tokens before the reply that may change how its first word is written


class ReplyText:
    """The text of tokens that come one by one.

    before: the tokens that the text goes on from; a tokenizer may write a word's first space with what stands before it.
    stop: strings that end the reply; what is shown ends before the first of them.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> None:
        self.tokenizer = tokenizer
        self.stop = [string for string in stop if string]
        self.tokens = list(before)[-CONTEXT:]
        self.context, self.read = 0, len(self.tokens)  # the tokens decoded again with what is new; the tokens in `held`
        self.shown, self.held = "", ""
        self.stopped = False

    def add(self, token: int) -> None:
        """One token more."""
        self.tokens.append(token)
        known, now = self._decode(self.tokens[self.context : self.read]), self._decode(self.tokens[self.context :])
        if len(now) > len(known) and not now.endswith(UNFINISHED):
            self.context, self.read = self.read, len(self.tokens)
            self._hold(now[len(known) :])

    def after(self, token: int) -> ReplyText:
        """The text with one token more; this one stays as it is."""
        longer = copy(self)
        longer.tokens = list(self.tokens)
        longer.add(token)
        return longer

    def end(self) -> None:
        """No token comes any more: show all that was held back."""
        known, now = self._decode(self.tokens[self.context : self.read]), self._decode(self.tokens[self.context :])
        self._hold(now[len(known) :])
        if not self.stopped:
            self.shown, self.held = self.shown + self.held, ""

    def _hold(self, text: str) -> None:
        if self.stopped:
            return
        self.held += text
        places = [place for string in self.stop if (place := self.held.find(string)) >= 0]
        if places:
            self.shown, self.held, self.stopped = self.shown + self.held[: min(places)], "", True
            return
        kept = max((_overlap(self.held, string) for string in self.stop), default=0)
        ready = len(self.held) - kept
        self.shown, self.held = self.shown + self.held[:ready], self.held[ready:]

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def text_of(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], before: Sequence[int] = (), stop: Sequence[str] = ()
) -> str:
    """The whole text of a reply; see `ReplyText`."""
    text = ReplyText(tokenizer, before, stop)
    for token in tokens:
        text.add(token)
    text.end()
    return text.shown


def _overlap(text: str, string: str) -> int:
    """How many characters at the end of `text` are a beginning of `string`."""
    most = min(len(text), len(string) - 1)
    return next((length for length in range(most, 0, -1) if text.endswith(string[:length])), 0)
