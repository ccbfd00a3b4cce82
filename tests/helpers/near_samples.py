"""Samples some of which are near others, and a second opinion on how near two texts are."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

import numpy as np

from vlm.data_tools.dedup_image import NO_HASH

Sample = tuple[str | None, tuple[int, ...]]


WORDS = "a red blue circle square dog cat on the left right of grass table big small two sits runs".split()


def grams(text: str | None) -> set:
    """The judge's own n-grams, of strings; its texts are ASCII words and spaces."""
    found = re.findall(r"[a-z0-9]+", (text or "").lower())
    edged = ["^", *found, "$"]
    return {*found, *itertools.pairwise(edged), *zip(edged, edged[1:], edged[2:], strict=False)} if found else set()


def jaccard(one: str | None, other: str | None) -> float:
    left, right = grams(one), grams(other)
    return len(left & right) / len(left | right) if left and right else 0.0


def mixed(number: int, seed: int) -> list[Sample]:
    """Texts and pictures with families of near ones, equal ones, empty ones and flat ones."""
    rng = np.random.default_rng(seed)
    samples: list[Sample] = []
    for _ in range(number):
        text: list[str] = rng.choice(WORDS, rng.integers(1, 24)).tolist()
        pictures = tuple(int(value) for value in rng.integers(1, 2**64, rng.integers(0, 3), dtype=np.uint64))
        if samples and rng.random() < 0.7:
            other = samples[rng.integers(len(samples))]
            text = (other[0] or "").split()
            pictures = tuple(flip(value, rng.integers(0, 64, rng.integers(0, 4))) for value in other[1])
            for _ in range(rng.integers(0, 3)):
                text.insert(rng.integers(len(text) + 1), str(rng.choice(WORDS)))
        if rng.random() < 0.05:
            pictures = (NO_HASH, *pictures[1:])
        samples.append((" ".join(text) if rng.random() > 0.05 else None, pictures))
    return samples


def flip(value: int, bits: Iterable[int]) -> int:
    for bit in bits:
        value ^= 1 << int(bit)
    return value
