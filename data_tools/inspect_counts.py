"""Counts that stay small however much is counted: whole numbers, and texts.

Knows what is kept and what is put together. Knows nothing of shards, or of what is counted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from vlm.charts import Bin

SHOWN_ANSWERS = 6
KEPT_TEXTS = 500  # distinct answers to one type of question, while counting twice as many
KEPT_LETTERS = 80  # of an answer or a type
BITS = 12  # of a number; below 2 ** BITS every number has a place of its own


@dataclass
class Histogram:
    """How often each whole number (0 or more) was seen. `count`, `total`, `least` and `most` are exact.

    Numbers below 4,096 are told apart; larger ones keep their 12 leading bits, which is at most 1 in 2,048 too low. So
    there are never more than 4,096 places and 2,048 for each doubling above.
    """

    places: Counter[int] = field(default_factory=Counter)
    count: int = 0
    total: int = 0
    least: int = 0
    most: int = 0

    def add(self, value: int) -> None:
        """Count one number."""
        shift = max(0, value.bit_length() - BITS)
        self.places[value >> shift << shift] += 1
        self._extend(1, value, value, value)

    def merge(self, other: Histogram) -> None:
        """Count all that `other` has counted."""
        if other.count:
            self.places.update(other.places)
            self._extend(other.count, other.total, other.least, other.most)

    def _extend(self, count: int, total: int, least: int, most: int) -> None:
        self.least = min(self.least, least) if self.count else least
        self.most = max(self.most, most)
        self.count += count
        self.total += total

    @property
    def mean(self) -> float:
        """Exact; 0 of nothing."""
        return self.total / self.count if self.count else 0.0

    @property
    def median(self) -> float:
        """The middle number, or the mean of the two in the middle; 0 of nothing. Exact below 4,096."""
        return (self.at((self.count - 1) // 2) + self.at(self.count // 2)) / 2 if self.count else 0.0

    def at(self, rank: int) -> int:
        """The number with `rank` numbers before it when they are sorted."""
        for place in sorted(self.places):
            rank -= self.places[place]
            if rank < 0:
                return max(place, self.least)
        return self.most

    def bins(self, about: int = 36) -> list[Bin]:
        """At most about so many bins (from, below, how many) of one round width, side by side, for a plot.

        Where the largest 0.5 % reach far beyond the rest, the last bin is wider and holds these.
        """
        if not self.count:
            return []
        usual = self.at((self.count - 1) * 995 // 1000)
        far = self.most - self.least > 3 * (usual - self.least) + about
        end = usual if far else self.most
        # Not finer than the places are, or empty bins would stand among full ones that nothing has emptied.
        shift = end.bit_length() - BITS
        width = _round_up(max(4 << shift if shift > 0 else 1, (end - self.least + 1) / about))
        first, last = self.least // width, end // width
        counts = [0] * (last - first + 1 + far)
        for place, count in self.places.items():
            counts[min(max(place, self.least) // width - first, len(counts) - 1)] += count
        edges = [(first + number) * width for number in range(len(counts) + 1)]
        edges[-1] = max(edges[-1], self.most + 1)
        return list(zip(edges, edges[1:], counts, strict=False))

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        exact = {"count": self.count, "min": self.least, "max": self.most, "mean": self.mean, "median": self.median}
        return exact | {"bins": [list(one) for one in self.bins()]}

    def __str__(self) -> str:
        return f"{self.median:,.10g} (from {self.least:,} to {self.most:,})" if self.count else "none"


@dataclass
class Tally:
    """How often each text was seen, exact for up to 1,000 distinct ones.

    Beyond that the rarest are put together as `others`, and the counts of those still named are lower bounds: one that
    comes again after it was put away is counted anew. The total is always exact. Texts are cut to 80 letters.
    """

    named: Counter[str] = field(default_factory=Counter)
    others: int = 0

    def add(self, text: str) -> None:
        """Count one text."""
        self.named[short(text, KEPT_LETTERS)] += 1
        self._shrink()

    def merge(self, other: Tally) -> None:
        """Count all that `other` has counted."""
        self.named.update(other.named)
        self.others += other.others
        self._shrink()

    def _shrink(self) -> None:
        # Half at a time: counting the best is dear, and what was put away early might have become frequent.
        if len(self.named) > 2 * KEPT_TEXTS:
            kept = Counter(dict(self.named.most_common(KEPT_TEXTS)))
            self.others += self.named.total() - kept.total()
            self.named = kept

    @property
    def total(self) -> int:
        """Everything counted."""
        return self.named.total() + self.others

    def as_dict(self) -> dict[str, Any]:
        """Plain values, the most frequent first."""
        return {"count": self.total, "answers": dict(self.named.most_common()), "others": self.others}

    def __str__(self) -> str:
        total = self.total
        said = [f"{text} {count / total:.1%}" for text, count in self.named.most_common(SHOWN_ANSWERS)]
        more = len(self.named) - SHOWN_ANSWERS
        rare = [f"{self.others / total:.1%} rare ones"] if self.others else []
        return f"{total:,}: " + ", ".join([*said, *([f"{more:,} more"] if more > 0 else []), *rare])


def short(text: str, letters: int) -> str:
    """Cut to so many letters, and such as can be printed: JSON may hold halves of surrogate pairs."""
    text = text if len(text) <= letters else text[: letters - 1] + "…"
    return text.encode("utf-8", "replace").decode("utf-8")


def _round_up(value: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, …"""
    power = 1
    while True:
        for factor in (1, 2, 5):
            if power * factor >= value:
                return power * factor
        power *= 10
