"""How often which n-grams stand in which texts, as arrays. Knows words between spaces; nothing of metrics.

A set of captions holds millions of n-grams; as numbers in sorted arrays they are counted, matched and summed at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Table:
    """Row i: text `text[i]` holds n-gram `gram[i]` `count[i]` times; all (rows,). `grams`: how many n-grams there are.

    Every (text, gram) stands once and in order, but for tables that `relabelled` returns.
    """

    text: np.ndarray
    gram: np.ndarray
    count: np.ndarray
    grams: int

    @property
    def key(self) -> np.ndarray:
        """One number for each (text, gram)."""
        return self.text * self.grams + self.gram

    def split(self, first: int) -> tuple[Table, Table]:
        """The table of the first so many texts, and that of the others, counted from 0."""
        at = int(np.searchsorted(self.text, first))
        ours = Table(self.text[:at], self.gram[:at], self.count[:at], self.grams)
        return ours, Table(self.text[at:] - first, self.gram[at:], self.count[at:], self.grams)

    def relabelled(self, group_of: np.ndarray) -> Table:
        """The same rows with `group_of[text]` for their text; a (group, gram) may stand several times."""
        return replace(self, text=group_of[self.text])

    def maximum(self) -> Table:
        """One row for each (text, gram), with the largest of its counts."""
        order = np.argsort(self.key, kind="stable")
        _, first = np.unique(self.key[order], return_index=True)
        rows = order[first]
        most = np.maximum.reduceat(self.count[order], first) if len(first) else self.count
        return Table(self.text[rows], self.gram[rows], most, self.grams)

    def lookup(self, other: Table) -> np.ndarray:
        """For each row of `other` the count of its (text, gram) here, 0 where there is none; this table is in order."""
        if not len(self.text):
            return np.zeros(len(other.text), self.count.dtype)
        keys, wanted = self.key, other.key
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[place] == wanted, self.count[place], 0)

    def weighed(self, weight: np.ndarray) -> Table:
        """Counts times the weights of their n-grams, `weight` (grams,)."""
        return replace(self, count=self.count * weight[self.gram])

    def norms(self, texts: int) -> np.ndarray:
        """(texts,) Euclidean lengths of the texts' counts."""
        return np.sqrt(np.bincount(self.text, self.count**2, texts))


class Ngrams:
    """The n-grams of texts whose words stand between spaces. `lengths`: words of each text, (texts,)."""

    def __init__(self, texts: Sequence[str]) -> None:
        split = [text.split() for text in texts]
        self.lengths = np.array([len(words) for words in split], dtype=np.int64)
        numbers: dict[str, int] = {}
        words = [numbers.setdefault(word, len(numbers)) for words in split for word in words]
        self._word, self._words = np.array(words, dtype=np.int64), len(numbers)
        self._text = np.repeat(np.arange(len(split)), self.lengths)
        self._place = np.arange(len(words))
        self._gram, self._n = self._word, 1  # number of the n-gram that begins at each of `_place`
        self._tables: dict[int, Table] = {}

    def table(self, n: int) -> Table:
        """The counts of n-grams, n ≥ 1."""
        while n not in self._tables:
            self._lengthen()
        return self._tables[n]

    def _lengthen(self) -> None:
        """Count the n-grams at hand, then make longer ones of them by the word that follows."""
        grams = int(self._gram.max(initial=-1)) + 1
        key, count = np.unique(self._text[self._place] * grams + self._gram, return_counts=True)
        text, gram = np.divmod(key, grams) if grams else (key, key)
        self._tables[self._n] = Table(text, gram, count, grams)
        ends = np.cumsum(self.lengths)[self._text[self._place]]
        goes_on = self._place + self._n < ends
        self._place, kept = self._place[goes_on], self._gram[goes_on]
        longer = kept * self._words + self._word[self._place + self._n]
        self._gram = np.unique(longer, return_inverse=True)[1].astype(np.int64)
        self._n += 1
