"""What can be in a drawn scene and what is: the levels, the things, how descriptions fit them, how scenes are composed.

Knows attributes, places and the wish that counts come out even. Knows nothing of pixels, words around a description, or
files. Lengths are fractions of the picture's side, y grows downwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Thing(NamedTuple):
    """One drawn thing. `x`, `y` its centre, `radius` the circle it is drawn in, `turn` in degrees."""

    size: str
    texture: str
    colour: str
    shape: str
    x: float = 0.0
    y: float = 0.0
    radius: float = 0.0
    turn: float = 0.0


class Description(NamedTuple):
    """Some attributes of a thing; None says nothing. Texts name the attributes in the order of the fields."""

    size: str | None = None
    texture: str | None = None
    colour: str | None = None
    shape: str | None = None

    def fits(self, thing: Thing) -> bool:
        """Whether the description is true of the thing."""
        return (
            (self.shape is None or self.shape == thing.shape)
            and (self.colour is None or self.colour == thing.colour)
            and (self.size is None or self.size == thing.size)
            and (self.texture is None or self.texture == thing.texture)
        )


def describe(thing: Thing, kind: Sequence[str]) -> Description:
    """The description of a thing by the attributes in `kind`."""
    return Description(**{attribute: getattr(thing, attribute) for attribute in kind})


Weighted = Mapping[tuple[str, ...], float]


@dataclass(frozen=True)
class Level:
    """One level of difficulty. Easy and hard differ in these fields only."""

    name: str
    picture_size: int  # side in pixels
    picture_format: str  # of Pillow; its file extension is in lower case
    colours: Mapping[str, tuple[int, int, int]]
    shapes: tuple[str, ...]
    sizes: Mapping[str, tuple[float, float]]  # smallest and largest radius; the sizes stand from small to large
    textures: tuple[str, ...]  # named in texts only where there is more than one
    held_out: tuple[tuple[str, str], ...]  # (colour, shape) pairs seen in test-compositional only
    things_given_count: tuple[tuple[float, ...], ...]  # row: the wanted count answer; column: weight of 1, 2, … things
    gap: float  # between two things, as a share of their radii; negative lets them overlap
    clear: float  # how far apart two centres must be on an axis before a question asks about it
    background: tuple[int, int]  # darkest and lightest grey
    noise: float  # standard deviation in 8-bit levels
    references: Weighted  # how a question refers to a thing: attributes named -> weight
    existence: Weighted  # what an existence question names
    counts: Weighted  # what a count question names
    comparisons: Weighted  # what "more … than …" compares
    train_questions: Mapping[str, int]  # type -> how many of it a training picture is asked
    nouns: tuple[str, ...] = ("object", "thing")
    pairs: Mapping[str, tuple[str, ...]] = field(init=False)  # colour -> shapes it has in training

    def __post_init__(self) -> None:
        held_out = set(self.held_out)
        pairs = {
            colour: tuple(shape for shape in self.shapes if (colour, shape) not in held_out) for colour in self.colours
        }
        object.__setattr__(self, "pairs", pairs)
        values = {"colour": self.colours, "shape": self.shapes, "size": self.sizes, "texture": self.textures}
        for kind in self.counts:
            if all(len(values[attribute]) == 1 for attribute in kind):
                raise ValueError(
                    f"level {self.name} counts by {kind}, of which there is 1; nothing else could be shown"
                )

    @property
    def largest_count(self) -> int:
        """Count questions are answered 0 … this."""
        return len(self.things_given_count) - 1


EASY = Level(
    name="easy",
    picture_size=64,
    picture_format="PNG",
    colours={
        "red": (222, 36, 40),
        "green": (34, 160, 62),
        "blue": (40, 78, 222),
        "yellow": (248, 220, 40),
        "purple": (146, 50, 190),
        "orange": (248, 136, 20),
    },
    shapes=("circle", "square", "triangle", "star"),
    sizes={"small": (0.088, 0.105), "large": (0.165, 0.188)},
    textures=("plain",),
    held_out=(("red", "square"), ("green", "star"), ("blue", "triangle"), ("yellow", "circle")),
    # Together these make 1, 2 and 3 things in .2, .4 and .4 of the pictures while every count is as frequent.
    things_given_count=((0.4, 0.4, 0.2), (0.4, 0.4, 0.2), (0.0, 0.8, 0.2), (0.0, 0.0, 1.0)),
    gap=0.12,
    clear=0.17,
    background=(118, 206),
    noise=0.0,
    references={
        ("colour", "shape"): 3,
        ("colour",): 2,
        ("shape",): 2,
        ("size",): 1,
        ("size", "shape"): 1,
        ("size", "colour"): 1,
        ("size", "colour", "shape"): 1,
    },
    existence={
        ("colour", "shape"): 4,
        ("colour",): 1,
        ("shape",): 1,
        ("size", "shape"): 1,
        ("size", "colour"): 1,
        ("size", "colour", "shape"): 1,
    },
    counts={("colour",): 3, ("shape",): 3, ("size",): 3, ("colour", "shape"): 1},
    comparisons={("colour",): 1, ("shape",): 1},
    train_questions={"existence": 2, "colour": 1, "shape": 1, "count": 1, "comparison": 2, "relation": 3},
)

HARD = Level(
    name="hard",
    picture_size=224,
    picture_format="JPEG",
    colours={
        "red": (214, 34, 38),
        "green": (30, 146, 58),
        "blue": (36, 74, 214),
        "yellow": (248, 222, 48),
        "purple": (134, 44, 178),
        "orange": (244, 130, 24),
        "cyan": (40, 204, 220),
        "pink": (250, 140, 190),
        "brown": (122, 74, 36),
        "black": (26, 26, 28),
    },
    shapes=("circle", "square", "triangle", "star", "heart", "cross", "hexagon", "crescent"),
    sizes={"small": (0.06, 0.068), "medium": (0.09, 0.1), "large": (0.13, 0.146)},
    textures=("plain", "striped", "dotted"),
    held_out=(
        ("red", "square"),
        ("green", "star"),
        ("blue", "triangle"),
        ("yellow", "circle"),
        ("purple", "heart"),
        ("orange", "cross"),
        ("cyan", "hexagon"),
        ("pink", "crescent"),
    ),
    things_given_count=(
        (1, 1, 1, 1, 1, 1),
        (1, 1, 1, 1, 1, 1),
        (0, 1, 1, 1, 1, 1),
        (0, 0, 1, 1, 1, 1),
        (0, 0, 0, 1, 1, 1),
        (0, 0, 0, 0, 1, 1),
    ),
    gap=-0.1,
    clear=0.12,
    background=(96, 216),
    noise=5.0,
    references={
        ("colour", "shape"): 3,
        ("colour",): 1,
        ("shape",): 1,
        ("texture", "shape"): 1,
        ("texture", "colour"): 1,
        ("size", "shape"): 1,
        ("size", "colour"): 1,
        ("size", "colour", "shape"): 1,
        ("texture", "colour", "shape"): 1,
        ("size", "texture", "colour", "shape"): 1,
    },
    existence={
        ("colour", "shape"): 4,
        ("colour",): 1,
        ("shape",): 1,
        ("texture", "shape"): 1,
        ("texture", "colour"): 1,
        ("size", "colour", "shape"): 1,
        ("size", "texture", "shape"): 1,
    },
    counts={("colour",): 2, ("shape",): 2, ("texture",): 1, ("size",): 1, ("colour", "shape"): 1},
    comparisons={("colour",): 2, ("shape",): 2, ("texture",): 1, ("size",): 1},
    train_questions={"existence": 2, "colour": 2, "shape": 1, "count": 1, "comparison": 2, "relation": 3},
)

LEVELS = {level.name: level for level in (EASY, HARD)}


@dataclass(frozen=True)
class Scene:
    """Things, and the count that was wished for: `counted` fits exactly `count` of them."""

    things: tuple[Thing, ...]
    counted: Description
    count: int


def pick(rng: Random, weighted: Mapping[T, float]) -> T:
    """One key of `weighted`, as often as its weight says."""
    return rng.choices(list(weighted), list(weighted.values()))[0]


def draw_attributes(level: Level, rng: Random) -> Thing:
    """A thing that training may show; every colour and, over all, every shape equally likely."""
    colour = rng.choice(list(level.colours))
    return Thing(rng.choice(list(level.sizes)), rng.choice(level.textures), colour, rng.choice(level.pairs[colour]))


def draw_held_out(level: Level, rng: Random) -> Thing:
    """A thing of a held-out pair."""
    colour, shape = rng.choice(level.held_out)
    return Thing(rng.choice(list(level.sizes)), rng.choice(level.textures), colour, shape)


def compose(level: Level, rng: Random, compositional: bool = False) -> Scene:
    """Draw a scene. The count answer is drawn first and the things to fit it, so that every count is as likely whatever
    is counted; a compositional scene counts a held-out pair and always shows a thing of one.
    """
    count = rng.randint(0, level.largest_count)
    row = level.things_given_count[count]
    number = rng.choices(range(1, len(row) + 1), row)[0]
    draw = draw_held_out if compositional else draw_attributes
    kind = ("colour", "shape") if compositional else pick(rng, level.counts)
    counted = describe(draw(level, rng), kind)
    things = [_wanted(level, rng, counted) for _ in range(count)]
    while len(things) < number:
        # A compositional scene without the counted pair shows another held-out one.
        thing = draw(level, rng) if count == len(things) == 0 else draw_attributes(level, rng)
        if not counted.fits(thing):
            things.append(thing)
    rng.shuffle(things)
    return Scene(_place(level, rng, things), counted, count)


def _wanted(level: Level, rng: Random, wanted: Description) -> Thing:
    """A thing that fits, drawn as things are drawn."""
    while True:
        thing = draw_attributes(level, rng)
        if wanted.colour and wanted.shape:
            thing = thing._replace(colour=wanted.colour, shape=wanted.shape)
        elif wanted.colour:
            thing = thing._replace(colour=wanted.colour, shape=rng.choice(level.pairs[wanted.colour]))
        if wanted.fits(thing):
            return thing


def _place(level: Level, rng: Random, things: Sequence[Thing]) -> tuple[Thing, ...]:
    """Give every thing a radius, a turn and a place where it keeps `level.gap` from the others and from the border."""
    sized = []
    for thing in things:
        low, high = level.sizes[thing.size]
        sized.append(thing._replace(radius=rng.uniform(low, high), turn=rng.uniform(-14, 14)))
    for _ in range(10_000):
        placed: list[Thing] = []
        for thing in sized:
            border = thing.radius * 1.22
            x, y = rng.uniform(border, 1 - border), rng.uniform(border, 1 - border)
            if len(things) == 1 and not (cell(x) and cell(y)):
                break
            if any(math.hypot(x - o.x, y - o.y) < (thing.radius + o.radius) * (1 + level.gap) for o in placed):
                break
            placed.append(thing._replace(x=x, y=y))
        else:
            return tuple(placed)
    raise AssertionError(f"level {level.name}: {len(things)} things do not fit; make them smaller")


def cell(coordinate: float) -> int | None:
    """The third of the picture that a coordinate lies in, 1, 2 or 3; None where that is not clear."""
    third = int(coordinate * 3)
    return third + 1 if 0.1 < coordinate * 3 - third < 0.9 or not 0.3 < coordinate < 0.7 else None
