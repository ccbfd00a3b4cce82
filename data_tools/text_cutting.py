"""Where a long text is cut into parts that fit a model: at the ends of sentences, and never through a character.

Knows tokenizers, sentences and white space. Knows nothing of files, documents' names or shards.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import regex
from tokenizers import Encoding
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vlm.errors import UsageError
from vlm.processing import VLMImageProcessor, VLMProcessor

CHARACTERS = 8  # of one token, at most, where the text of so many tokens is looked for
BYTES = 4  # tokens of one character at most, in vocabularies of bytes

# A stop, with what closes a quotation behind it, that no abbreviation, initial or lower-case letter speaks against.
_SENTENCE = regex.compile(
    r"(?<!\b(?:Mr|Mrs|Ms|Dr|Prof|St|Fig|No|vs|etc|cf|e\.g|i\.e|\p{Lu}))[.!?…]+[\"'”’»)\]]*(?=\s)(?!\s+\p{Ll})"
    r"|[。！？]+[\"”’」』）]*"
    r"|(?=\n\s*\n)"
)
_LINE = regex.compile(r"(?=\r?\n)")
_WORD = regex.compile(r"(?=\s)")
_GRAPHEME = regex.compile(r"\X")
_BLANK = re.compile(r"\s*")
_LEADING = re.compile(r"\ufeff?\s*")
_SEEN_BEFORE, _SEEN_BEYOND = 256, 64  # characters around a cut that tell whether it goes through a grapheme


@dataclass(frozen=True)
class Part:
    """One part of a text. White space where parts meet is kept beside them and not in them, so none is blank.

    start: its first character's place in the text. overlap: so many characters of it stand in earlier parts already.
    before, after: the white space around it; `before` is empty but where the text begins with some, or with a byte order
    mark. tokens: how many it has alone.
    """

    text: str
    start: int
    overlap: int
    before: str
    after: str
    tokens: int


class Cutter:
    """Cuts texts into parts of at most `length` tokens that share up to `overlap` tokens with the part before.

    Special tokens are not counted, and a control token's name in the text counts as the ordinary words that
    `VLMProcessor.plain` makes of it. Raises UsageError for an overlap that leaves no room, or a tokenizer that cannot tell
    where its tokens lie in the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int, overlap: int) -> None:
        if length < 1 or not 0 <= overlap < length:
            raise UsageError(
                f"overlap {overlap} of length {length} tokens; give an overlap of at least 0 and below length"
            )
        if not getattr(tokenizer, "is_fast", False):
            raise UsageError(f"{type(tokenizer).__name__} does not tell where its tokens lie; give a fast tokenizer")
        self.length, self.overlap = length, overlap
        self._plain = VLMProcessor(VLMImageProcessor(), tokenizer).plain
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()

    def count(self, text: str) -> int:
        """Tokens of a text, as it stands or without control tokens, whichever are more."""
        plain = self._plain(text)
        return max(len(self._encode(each)) for each in {text, plain})

    def parts(self, text: str, context: int = 0) -> Iterator[Part]:
        """The parts of a text from its character `context` on; what stands before only lends the first part its overlap.

        A blank text has none. Raises UsageError where a character has more than `length` tokens.
        """
        before = leading_blank(text) if context == 0 else _blank(text, context)
        position, floor = context + len(before), 0 if context else len(before)
        window = self.length * CHARACTERS // 2
        while position < len(text):
            start, end, tokens, window = self._next(text, floor, position, window)
            after = _blank(text, end)
            yield Part(text[start:end], start, position - start, before, after, tokens)
            before, floor, position = "", start + 1, end + len(after)

    def _next(self, text: str, floor: int, position: int, window: int) -> tuple[int, int, int, int]:
        """Start, end and tokens of the part that goes on from `position`, and the window that held it."""
        overlap = self.overlap
        while True:
            start = self._start(text, floor, position, overlap)
            encoding, window = self._first_tokens(text, start, window)
            end, tokens = self._end(text, start, position, encoding)
            if end > position:
                return start, end, tokens, window
            if not overlap:
                character = text[position]
                raise UsageError(
                    f"{character!r} has {self.count(character)} tokens, length is {self.length}; raise the length"
                )
            overlap //= 2

    def _encode(self, text: str) -> Encoding:
        return self._backend.encode(text, add_special_tokens=False)

    def _first_tokens(self, text: str, start: int, window: int) -> tuple[Encoding, int]:
        """The text from `start` on as more than `length` tokens, or all of it; and how many characters that took."""
        while True:
            encoding = self._encode(text[start : start + window])
            if len(encoding) > self.length or start + window >= len(text):
                # Half as much again as this part needed leaves room for one with longer words.
                needed = encoding.offsets[self.length][0] if len(encoding) > self.length else window
                return encoding, max(self.length, needed * 3 // 2)
            window *= 2

    def _start(self, text: str, floor: int, position: int, overlap: int) -> int:
        """Where the part begins: a sentence or word that is `overlap` tokens before `position`, or down to ¾ of it."""
        low = max(floor, position - overlap * CHARACTERS)
        if not overlap or low >= position:
            return position
        offsets = self._encode(text[low:position]).offsets
        if not offsets:
            return position
        first = low + offsets[max(0, len(offsets) - overlap)][0]
        last = low + offsets[max(0, len(offsets) - overlap * 3 // 4 - 1)][0]
        start = _cut(text, first - 1, last, low - 1)
        return start + len(_blank(text, start))

    def _end(self, text: str, start: int, position: int, encoding: Encoding) -> tuple[int, int]:
        """Where the part ends, in its last quarter by choice, and its tokens; an end at `position` where nothing fits."""
        offsets, near, high = encoding.offsets, position, len(text)
        if len(offsets) > self.length:
            near = start + offsets[self.length - self.length // 4][0]
            high = start + offsets[self.length][0]
        while high > position:
            low = max(near, position) if near < high else position
            end = _cut(text, low, high, position) if high < len(text) else high
            end = start + len(text[start:end].rstrip())
            # A text's tokens are not those it has within a longer one, so what counts is what it has alone.
            tokens = self.count(text[start:end])
            if tokens <= self.length:
                return end, tokens
            high = end - max(1, (tokens - self.length) // BYTES)
        return position, 0


@lru_cache(maxsize=1)
def cutter(tokenizer: str, length: int, overlap: int) -> Cutter:
    """A cutter by the path or id of its tokenizer; made once in a process. Raises UsageError as `Cutter` does."""
    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"tokenizer {tokenizer}: can not be loaded ({reason}); give a path or a hub id") from None
    return Cutter(loaded, length, overlap)


def leading_blank(text: str) -> str:
    """The byte order mark and white space that a text begins with."""
    return _matched(_LEADING, text, 0)


def _blank(text: str, start: int) -> str:
    """The white space that begins at a place."""
    return _matched(_BLANK, text, start)


def _matched(pattern: re.Pattern[str], text: str, start: int) -> str:
    found = pattern.match(text, start)
    return found[0] if found else ""


def _cut(text: str, low: int, high: int, lowest: int) -> int:
    """The last place with low < place ≤ high where a sentence ends, else a line, else a word.

    Without any the last one above `lowest` that goes through no grapheme, else `high`.
    """
    low, beyond = low + len(_blank(text, low)), min(len(text), high + _SEEN_BEYOND)
    for pattern in (_SENTENCE, _LINE, _WORD):
        places = [found.end() for found in pattern.finditer(text, low, beyond) if low < found.end() <= high]
        if places:
            return places[-1]
    graphemes = _GRAPHEME.finditer(text, max(0, high - _SEEN_BEFORE), beyond)
    return max((found.end() for found in graphemes if lowest < found.end() <= high), default=high)
