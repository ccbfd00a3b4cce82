"""Which pictures a model is shown: the sample's own, none to speak of (blind), or another sample's (shuffled).

Knows how to open pictures, wherever they are kept, and only when they are wanted. Knows nothing of tasks, scores or
what is asked about a picture.
"""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from vlm.errors import UsageError
from vlm.images import open_image

Pictures = tuple[Image.Image, ...]
GREY = (128, 128, 128)
SHUFFLED = "shuffled"


class Pictured(Protocol):
    """Something with pictures: each is what `open_image` takes, or a function that gives it when it is wanted."""

    @property
    def key(self) -> str:
        """What a person finds it by."""

    @property
    def images(self) -> Sequence[Any]:
        """Its pictures in order, not yet opened."""


@dataclass(frozen=True)
class Gallery:
    """The pictures that a question is asked about, by the name of the first."""

    key: str
    images: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Look:
    """One way to look at samples. Equal keys mean equal pictures, so that a question about them is asked once."""

    name: str
    key: Callable[[int], Any]  # number of a sample -> something hashable that stands for what is shown of it
    load: Callable[[Any], Pictures]


def as_it_is(samples: Sequence[Pictured]) -> Look:
    """Every sample with its own pictures."""
    return Look("true", lambda index: index, lambda index: _open(samples[index]))


def blind(samples: Sequence[Pictured], colour: tuple[int, int, int] = GREY) -> Look:
    """Every picture replaced by one of its size in a single colour: give the one that the processor makes zero."""

    @cache
    def empty(size: tuple[int, int]) -> Image.Image:
        return Image.new("RGB", size, colour)

    return Look(
        "blind",
        cache(lambda index: _sizes(samples[index])),
        lambda sizes: tuple(empty(size) for size in sizes),
    )


def shuffled(samples: Sequence[Pictured], seed: int = 0) -> Look | None:
    """Every sample with the pictures of another one that has as many, and others; equal pictures get the same ones.

    A sample has its own only if no other pictures are as many; None where that is so of all that have any.
    """
    first: dict[tuple[Any, ...], int] = {}  # pictures -> the first sample with them
    alike = [first.setdefault(tuple(map(_same, samples[index].images)), index) for index in range(len(samples))]
    groups: dict[int, list[int]] = {}
    for images, index in first.items():
        groups.setdefault(len(images), []).append(index)
    if any(groups) and all(len(members) == 1 for members in groups.values()):
        return None
    other: dict[int, int] = {}
    for members in groups.values():
        other |= dict(zip(members, _one_cycle(members, random.Random(seed)), strict=True))
    return Look(SHUFFLED, lambda index: other[alike[index]], lambda index: _open(samples[index]))


def _same(source: Any) -> Any:
    """What is equal for the same picture; not its bytes, which would all be held."""
    return hashlib.sha256(source).digest() if isinstance(source, bytes) else source


def zero_colour(processor: object) -> tuple[int, int, int]:
    """The colour that normalisation maps nearest to 0: the processor's mean in 8 bits, mid-grey if it has none."""
    mean = getattr(getattr(processor, "image_processor", None), "mean", None)
    if mean is None:
        return GREY
    red, green, blue = (round(255 * value) for value in mean)
    return red, green, blue


def _one_cycle(members: list[int], rng: random.Random) -> list[int]:
    """A random permutation that is a single cycle, so that nothing stays in its place (Sattolo 1986)."""
    shuffled = list(members)
    for i in range(len(shuffled) - 1, 0, -1):
        j = rng.randrange(i)
        shuffled[i], shuffled[j] = shuffled[j], shuffled[i]
    return shuffled


def open_all(images: Sequence[Any], name: str) -> Pictures:
    """Open every picture; what is no path is called `name` where it can not be opened."""
    return tuple(_open_one(source() if callable(source) else source, name) for source in images)


def _open(sample: Pictured) -> Pictures:
    return open_all(sample.images, f"sample {sample.key}")


def _open_one(source: Any, name: str) -> Image.Image:
    return open_image(source, name=None if isinstance(source, Path) else name)


def _sizes(sample: Pictured) -> tuple[tuple[int, int], ...]:
    """Width and height of each picture, from its header alone."""
    sizes = []
    for source in sample.images:
        held = source() if callable(source) else source
        if isinstance(held, Image.Image):
            sizes.append(held.size)
            continue
        try:
            with Image.open(
                held if isinstance(held, Path) else io.BytesIO(held), formats=("JPEG", "PNG", "WEBP")
            ) as image:
                sizes.append(image.size)
        except Exception as error:  # Pillow raises a dozen kinds of exception at damaged files
            raise UsageError(f"sample {sample.key}: its picture can not be read ({error}); replace the file") from None
    return tuple(sizes)
