"""How examples share rows: which of them go together, and what a row of several is.

Knows lengths, arrays of tokens and the numbers of pictures. Knows nothing of samples, tokenizers or what is learnt from a
row. A row's documents are kept apart by their numbers, begin at position 0 each, and see the pictures of their own sample.

Shapes: B examples, R rows, L tokens padded to a multiple of 8, n pictures of the whole batch, M picture slots a row.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

# Rows are padded to what a matrix product takes at once, and shapes repeat.
TILE = 8
ENDLESS = 2**62
# Rows wider than so many times the longest example save next to no padding.
WIDEST = 4
# One more example in every row costs its tokens about this share of all their work: keys that they must not look at.
COMPANION = 1 / 32


def _no_tokens() -> np.ndarray:
    return np.empty(0, dtype=np.int64)


@dataclass
class Example:
    """What one sample gives: token ids and labels (L,), and whatever else its objective needs.

    positions, documents: (L,), of each token within its document, and its document's number from 1. token_image: (L,), which
    of the pictures (n, 3, H, W) it sees, -1 for none. types: of the question that each document asks.
    """

    ids: np.ndarray
    labels: np.ndarray
    pixels: Tensor | None = None
    positions: np.ndarray = field(default_factory=_no_tokens)
    documents: np.ndarray = field(default_factory=_no_tokens)
    token_image: np.ndarray = field(default_factory=_no_tokens)
    types: list[str | None] = field(default_factory=list)
    pair: list[int] | None = None
    faults: list[str] = field(default_factory=list)

    @property
    def pictures(self) -> int:
        """How many it has."""
        return 0 if self.pixels is None else len(self.pixels)


@dataclass
class Row:
    """Examples side by side, as in `Example`; pictures: the number of each one in the batch, by its slot."""

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    documents: np.ndarray
    token_image: np.ndarray
    types: list[str | None]
    pictures: list[int]


def layout(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Which examples, of so many tokens each, share a row of at most `most`: their numbers, row by row.

    For a number of rows, the longest goes first, each to the row that has least (Graham 1969), so that rows end up alike in
    tokens and in pictures; of these, the number of rows is taken with the least padding.
    """
    total, longest = sum(lengths), tiles(max(lengths))
    widest = min(most, WIDEST * longest)
    best, least = [[number] for number in range(len(lengths))], float("inf")
    for count in range(-(-total // widest), len(lengths) + 1):
        rows = _spread(lengths, count)
        width = max(sum(lengths[number] for number in row) for row in rows)
        if width > widest:
            continue
        cost = count * tiles(width) * (1 + COMPANION * max(len(row) for row in rows))
        if cost < least:
            best, least = rows, cost
        if tiles(width) == longest:  # no row can be narrower, and more of them are more padding
            break
    return sorted(sorted(row) for row in best)


def _spread(lengths: Sequence[int], count: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, row) for row in range(count)]
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        tokens, row = heapq.heappop(filled)
        rows[row].append(number)
        heapq.heappush(filled, (tokens + lengths[number], row))
    return rows


def laid(examples: Sequence[Example], rows: Sequence[Sequence[int]]) -> list[Row]:
    """The rows of a layout. The pictures of all examples lie flat in the order of the examples, whatever their rows."""
    first = np.cumsum([0, *(example.pictures for example in examples)])
    return [_row([examples[number] for number in row], [int(first[number]) for number in row]) for row in rows]


def _row(examples: Sequence[Example], first: Sequence[int]) -> Row:
    """One row. first: the number in the batch of each example's first picture."""
    documents, token_image = [], []
    pictures: list[int] = []
    before = 0
    for example, start in zip(examples, first, strict=True):
        documents.append(example.documents + before)
        before += int(example.documents[-1])
        seen = example.token_image
        token_image.append(np.where(seen >= 0, seen + len(pictures), -1))
        pictures += range(start, start + example.pictures)
    return Row(
        ids=np.concatenate([example.ids for example in examples]),
        labels=np.concatenate([example.labels for example in examples]),
        positions=np.concatenate([example.positions for example in examples]),
        documents=np.concatenate(documents),
        token_image=np.concatenate(token_image),
        types=[kind for example in examples for kind in example.types],
        pictures=pictures,
    )


def slots(rows: Sequence[Row]) -> Tensor:
    """Image slots (R, M) of rows, -1 where a slot is empty; M is at least 1."""
    most = max(1, *(len(row.pictures) for row in rows))
    return torch.tensor([row.pictures + [-1] * (most - len(row.pictures)) for row in rows])


def tiles(length: int) -> int:
    """A length in tokens, made whole tiles: at least one."""
    return max(TILE, -(-length // TILE) * TILE)


def padded(rows: Sequence[np.ndarray], value: int, most: int = ENDLESS) -> Tensor:
    """Rows of numbers, right-padded with `value` to a multiple of 8, or to `most` if that is less -> (B, L) long."""
    longest = max((len(row) for row in rows), default=0)
    tensor = torch.full((len(rows), min(most, tiles(longest))), value)
    for row, numbers in enumerate(rows):
        tensor[row, : len(numbers)] = torch.from_numpy(numbers)
    return tensor
