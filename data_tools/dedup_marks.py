"""What is kept of a piece's samples to compare them: the rules, rows of different lengths, marks in files.

Knows what counts by which rules, and the file of a piece. Knows nothing of other pieces or of how samples are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlm.errors import UsageError
from vlm.files import atomic_write

from .dedup_image import MOST_DISTANCE, NO_HASH
from .dedup_text import mix

MODES = ("text", "image", "pair")


@dataclass(frozen=True)
class Rules:
    """What is near. `by` "text": texts whose n-grams have a Jaccard similarity of `jaccard` or more. `by` "image": as many
    pictures, each within `distance` bits of the other's hash. `by` "pair": both; where neither has pictures, the texts.

    A text without words is near to none, nor is a sample without pictures (but in "pair") or with one that is near-uniform.
    """

    by: Literal["text", "image", "pair"] = "pair"
    jaccard: float = 0.8
    distance: int = 4

    def __post_init__(self) -> None:
        if self.by not in MODES:
            raise UsageError(f"duplicates by {self.by!r}: not known; use one of {', '.join(MODES)}")
        if not 0.5 <= self.jaccard <= 1:
            raise UsageError(f"duplicates at a Jaccard similarity of {self.jaccard}: not in 0.5 to 1; 0.8 is usual")
        if not 0 <= self.distance <= MOST_DISTANCE:
            raise UsageError(f"duplicates within {self.distance} bits: not in 0 to {MOST_DISTANCE}; 4 is usual")

    @property
    def code(self) -> np.ndarray:
        return np.array([MODES.index(self.by), self.jaccard, self.distance])


@dataclass(frozen=True)
class Rows:
    """Rows of different lengths: row i is `values[starts[i] : starts[i + 1]]`, uint64; `starts` (rows + 1,) int64."""

    starts: np.ndarray
    values: np.ndarray

    @staticmethod
    def of(rows: Iterable[Sequence[int]]) -> Rows:
        rows = list(rows)
        starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return Rows(starts, np.array([value for row in rows for value in row], np.uint64))

    @staticmethod
    def join(parts: Sequence[Rows]) -> Rows:
        lengths = np.concatenate([part.lengths for part in parts])
        return Rows(np.concatenate([[0], np.cumsum(lengths)]), np.concatenate([part.values for part in parts]))

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def take(self, rows: np.ndarray) -> Rows:
        begin = self.starts[rows]
        lengths = self.starts[rows + 1] - begin
        starts = np.concatenate([[0], np.cumsum(lengths)])
        place = np.repeat(begin - starts[:-1], lengths) + np.arange(starts[-1])
        return Rows(starts, self.values[place])

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Of every row, the sum of its `values`, 0 where it is empty."""
        total = np.concatenate([np.zeros(1, values.dtype), np.cumsum(values)])
        return total[self.starts[1:]] - total[self.starts[:-1]]


@dataclass(frozen=True)
class Marks:
    """All that is kept of a piece's samples to compare them: `len` samples, `bands` (banded,) of those with a text to band."""

    code: np.ndarray
    shingles: Rows
    pictures: Rows
    banded: np.ndarray
    bands: np.ndarray

    def __len__(self) -> int:
        return len(self.shingles.starts) - 1

    def save(self, folder: str | Path, piece: str) -> None:
        """Write them as the marks of `piece`, a name that may be a file's, whole or not at all."""
        with atomic_write(_marks(folder, piece)) as file:
            np.savez(
                file,
                samples=len(self),
                code=self.code,
                shingle_starts=self.shingles.starts,
                shingles=self.shingles.values,
                picture_starts=self.pictures.starts,
                pictures=self.pictures.values,
                banded=self.banded,
                bands=self.bands,
            )

    @staticmethod
    def load(folder: str | Path, piece: str) -> Marks:
        """Raises UsageError if the piece was never signed."""
        with opened(_marks(folder, piece)) as file:
            shingles = Rows(file["shingle_starts"], file["shingles"])
            pictures = Rows(file["picture_starts"], file["pictures"])
            return Marks(file["code"], shingles, pictures, file["banded"], file["bands"])


def identities(rules: Rules, shingles: Rows, pictures: Rows) -> tuple[np.ndarray, np.ndarray]:
    """A hash of all that counts by the rules, (samples,) uint64, and which samples can have a duplicate at all."""
    text = mix(shingles.sums(mix(shingles.values)))
    place = np.arange(len(pictures.values)) - np.repeat(pictures.starts[:-1], pictures.lengths)
    picture = mix(pictures.sums(mix(mix(pictures.values) + place.astype(np.uint64))))
    has_text = shingles.lengths > 0
    sound = pictures.sums((pictures.values == NO_HASH).astype(np.int64)) == 0
    if rules.by == "text":
        return text, has_text
    if rules.by == "image":
        return picture, sound & (pictures.lengths > 0)
    return mix(text + np.uint64(3) * picture), has_text & sound


def signed_samples(folder: Path, rules: Rules, piece: str) -> int:
    """How many samples the piece has. Raises UsageError if it has no marks, or has those of other rules."""
    with opened(_marks(folder, piece)) as file:
        if (file["code"] != rules.code).any():
            by, jaccard, distance = file["code"].tolist()
            signed = f"by {MODES[int(by)]} at {jaccard:g} and {distance:g} bits"
            asked = f"by {rules.by} at {rules.jaccard:g} and {rules.distance} bits"
            raise UsageError(f"{_marks(folder, piece)}: signed {signed}, asked for {asked}; sign it again")
        return int(file["samples"])


def opened(path: Path) -> Any:
    """The arrays of a file. Raises UsageError where it is not there."""
    try:
        return np.load(path)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; sign every piece, then find the duplicates") from None


def _marks(folder: str | Path, piece: str) -> Path:
    return Path(folder) / "marks" / f"{piece}.npz"
