"""How many attributes of the things in a picture its caption names right. Knows words and lists of things.

Knows nothing of pictures. A thing is a mapping of attributes to words, {"size": "small", "colour": "red", "shape":
"circle"}; a caption names things in phrases like "a small red circle" or "two large blue stars". Named and true things
are paired so that as many attributes as possible agree, in any order. The score is

    attributes = words that agree / (attributes of a thing × max(true things, named things))

so a missing thing and an invented one both cost all their attributes, and a caption is right only if it is complete.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Thing = Mapping[str, str]

NUMBERS = {word: number for number, word in enumerate("two three four five six seven eight nine ten".split(), start=2)}
WORD_OR_STOP = re.compile(r"[a-z]+|[,.;]")
# What ends a phrase whose noun is missing.
STOPS = frozenset([",", ".", ";", "a", "an", "the", "and", "one", *NUMBERS])
NOUN = "shape"


@dataclass(frozen=True)
class Count:
    """What one caption got right: `right` of `possible` attributes, having named `named` of the picture's `true`."""

    right: int
    possible: int
    named: int
    true: int


class Vocabulary:
    """Which words name which attribute. Made of the things of a whole set, so that it knows every word in use."""

    def __init__(self, things: Iterable[Thing]) -> None:
        self.meaning: dict[str, tuple[str, str]] = {}
        attributes: dict[str, None] = {}
        for thing in things:
            for attribute, word in thing.items():
                attributes[attribute] = None
                self.meaning[word] = (attribute, word)
                if attribute == NOUN:
                    self.meaning |= {word + "s": (attribute, word), word + "es": (attribute, word)}
        self.attributes = tuple(attributes)

    def things_named(self, caption: str) -> list[dict[str, str]]:
        """The things that a caption speaks of, with the attributes it gives them; a noun or a stop ends each phrase."""
        found: list[dict[str, str]] = []
        phrase: dict[str, str] = {}
        number = 1
        for word in [*WORD_OR_STOP.findall(caption.lower()), "."]:
            attribute, value = self.meaning.get(word, (None, None))
            if attribute is not None and value is not None:
                phrase[attribute] = value
            if attribute == NOUN or (word in STOPS and phrase):
                found += [dict(phrase) for _ in range(number)]
                phrase, number = {}, 1
            if word in STOPS:
                number = NUMBERS.get(word, 1)
        return found

    def count(self, caption: str, things: Sequence[Thing]) -> Count:
        """What `caption` got right of a picture that shows `things`."""
        named = self.things_named(caption)
        return Count(
            right=_best_agreement(named, things),
            possible=len(self.attributes) * max(len(named), len(things)),
            named=sum(map(len, named)),
            true=len(self.attributes) * len(things),
        )


def attribute_metrics(counts: Sequence[Count]) -> dict[str, float]:
    """`attributes` as above over all captions together, with `attributes_precision` (of the words named) and
    `attributes_recall` (of the true ones) beside it. Raises ValueError without counts."""
    if not counts:
        raise ValueError("no captions to score")
    right = sum(count.right for count in counts)
    return {
        "attributes": _share(right, sum(count.possible for count in counts)),
        "attributes_precision": _share(right, sum(count.named for count in counts)),
        "attributes_recall": _share(right, sum(count.true for count in counts)),
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _best_agreement(named: Sequence[Thing], true: Sequence[Thing]) -> int:
    """The most attributes that agree over all one-to-one pairings."""
    few, many = sorted((named, true), key=len)
    best = [0] * (1 << len(few))  # best[mask]: with the things of `few` in mask paired
    for thing in many:
        agree = [sum(thing.get(attribute) == word for attribute, word in other.items()) for other in few]
        for mask in reversed(range(len(best))):
            best[mask] = max([best[mask]] + [best[mask ^ 1 << i] + agree[i] for i in range(len(few)) if mask >> i & 1])
    return best[-1]
