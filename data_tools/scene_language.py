"""What is said about a scene: captions, and questions with one-word answers.

Knows words and which of them are true of a scene. Knows nothing of pixels or files. A question is made from its answer:
the answer is drawn first, evenly, then the words that have it, so that no text makes one answer likelier than another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

from .scene_world import Description, Level, Scene, Thing, cell, describe, draw_attributes, draw_held_out, pick

PLACES = {
    (1, 1): "at the top left",
    (2, 1): "at the top",
    (3, 1): "at the top right",
    (1, 2): "on the left",
    (2, 2): "in the middle",
    (3, 2): "on the right",
    (1, 3): "at the bottom left",
    (2, 3): "at the bottom",
    (3, 3): "at the bottom right",
}
NUMBERS = ("no", "a", "two", "three", "four", "five", "six")
# (axis, words where the first thing has the smaller coordinate, words where it has the larger)
RELATIONS = (("x", "left of", "right of"), ("y", "above", "below"))
CHOICES = {"x": ("left", "right", "{} or {} of"), "y": ("above", "below", "{} or {}")}
OPENINGS = {"": 4, "a picture of ": 1, "there is ": 1, "you see ": 1}


@dataclass(frozen=True)
class Asking:
    """What a question maker needs: the scene, and the things and pairs that its questions should be about."""

    level: Level
    scene: Scene
    focus: tuple[Thing, ...]  # a question is about one of these at least
    draw: Callable[[Level, Random], Thing]  # draws what an existence question asks for in vain
    rng: Random

    def reference(self, thing: Thing, without: str = "") -> Description | None:
        """A description that fits this thing of the scene only and does not name the attribute `without`."""
        kinds = {kind: weight for kind, weight in self.level.references.items() if without not in kind}
        described = {describe(thing, kind): weight for kind, weight in kinds.items()}
        unique = {d: weight for d, weight in described.items() if sum(map(d.fits, self.scene.things)) == 1}
        return pick(self.rng, unique) if unique else None


def noun_phrase(level: Level, description: Description, noun: str, plural: bool = False) -> str:
    """`small red circle`, `striped object`, `red circles`; `noun` where no shape is named."""
    shape = description.shape or noun
    if plural:
        shape += "es" if shape == "cross" else "s"
    texture = description.texture if len(level.textures) > 1 else None
    return " ".join(word for word in (description.size, texture, description.colour, shape) if word)


def with_article(phrase: str) -> str:
    """`a red circle`, `an orange star`."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


# ---------------------------------------------------------------------------------------------------- captions


def caption(level: Level, scene: Scene, rng: Random) -> str:
    """Every thing with its size, texture, colour and shape in random order, mostly with a place or a relation."""
    groups: dict[Description, list[Thing]] = {}
    for thing in scene.things:
        groups.setdefault(describe(thing, ("size", "texture", "colour", "shape")), []).append(thing)
    phrases = {description: _counted(level, description, len(things)) for description, things in groups.items()}
    single = [things[0] for things in groups.values() if len(things) == 1]
    names = {id(things[0]): phrases[description] for description, things in groups.items()}
    pair = _related(level, single, rng)
    clear = [thing for thing in single if cell(thing.x) and cell(thing.y)]
    if pair and (not clear or rng.random() < 0.65):
        first, words, second = pair
        rest = [names[id(things[0])] for things in groups.values() if things[0] not in (first, second)]
        rng.shuffle(rest)
        parts = [*rest, f"{names[id(first)]} {words} {names[id(second)]}"]
    else:
        placed = rng.sample(clear, min(len(clear), 1 if len(groups) > 2 else 2))
        for thing in placed:
            names[id(thing)] += " " + PLACES[cell(thing.x), cell(thing.y)]  # type: ignore[index]
        parts = [names[id(things[0])] for things in groups.values()]
        rng.shuffle(parts)
    return pick(rng, OPENINGS) + _listed(parts)


def _counted(level: Level, description: Description, count: int) -> str:
    phrase = noun_phrase(level, description, "", plural=count > 1)
    return with_article(phrase) if count == 1 else f"{NUMBERS[count]} {phrase}"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)


def _related(level: Level, things: Sequence[Thing], rng: Random) -> tuple[Thing, str, Thing] | None:
    """Two of the things and the words of a relation that is clear between them."""
    for first, second in _pairs(things, rng):
        clear = _clear_relations(level, first, second)
        if clear:
            _, before, after, smaller = rng.choice(clear)
            return first, before if smaller else after, second
    return None


def _pairs(things: Sequence[Thing], rng: Random) -> list[tuple[Thing, Thing]]:
    pairs = [(a, b) for a in things for b in things if a is not b]
    rng.shuffle(pairs)
    return pairs


def _clear_relations(level: Level, first: Thing, second: Thing) -> list[tuple[str, str, str, bool]]:
    """(axis, words before, words after, whether the first thing comes before) of each axis on which they lie apart."""
    apart = [(axis, getattr(second, axis) - getattr(first, axis), before, after) for axis, before, after in RELATIONS]
    return [(axis, before, after, d > 0) for axis, d, before, after in apart if abs(d) >= level.clear]


# --------------------------------------------------------------------------------------------------- questions


def existence(asking: Asking) -> tuple[str, str] | None:
    """`Is there a red circle?` What is absent shares an attribute with what is there, if that is possible."""
    level, rng = asking.level, asking.rng
    kind = ("colour", "shape") if asking.draw is draw_held_out else pick(rng, level.existence)
    wanted = rng.random() < 0.5
    described = describe(rng.choice(asking.focus), kind) if wanted else _absent(asking, kind)
    if described is None:
        return None
    phrase = with_article(noun_phrase(level, described, rng.choice(level.nouns)))
    return rng.choice(("Is there {}?", "Do you see {}?")).format(phrase), "yes" if wanted else "no"


def _absent(asking: Asking, kind: tuple[str, ...]) -> Description | None:
    # Drawn as things are drawn, not evenly over what is absent: so each description is absent as often as present.
    for attempt in range(80):
        described = describe(asking.draw(asking.level, asking.rng), kind)
        near = any(getattr(described, a) == getattr(thing, a) for a in kind for thing in asking.scene.things)
        if (near or len(kind) == 1 or attempt >= 40) and not any(map(described.fits, asking.scene.things)):
            return described
    return None


def attribute(asking: Asking, name: str) -> tuple[str, str] | None:
    """`What colour is the circle?`"""
    thing = asking.rng.choice(asking.focus)
    reference = asking.reference(thing, without=name)
    if reference is None:
        return None
    phrase = noun_phrase(asking.level, reference, asking.rng.choice(asking.level.nouns))
    return f"{asking.rng.choice(('What', 'Which'))} {name} is the {phrase}?", getattr(thing, name)


def count(asking: Asking) -> tuple[str, str]:
    """`How many red objects are there?` — of what the scene was composed for."""
    phrase = noun_phrase(asking.level, asking.scene.counted, asking.rng.choice(asking.level.nouns), plural=True)
    text = asking.rng.choice(("How many {} are there?", "How many {} do you see?")).format(phrase)
    return text, str(asking.scene.count)


def comparison(asking: Asking) -> tuple[str, str] | None:
    """`Are there more circles than squares?` or `Is the red circle larger than the star?`"""
    makers = [_more, _larger]
    asking.rng.shuffle(makers)
    return makers[0](asking) or makers[1](asking)


def _more(asking: Asking) -> tuple[str, str] | None:
    level, rng = asking.level, asking.rng
    (name,) = pick(rng, level.comparisons)
    values = {"size": level.sizes, "texture": level.textures, "colour": level.colours, "shape": level.shapes}[name]
    many = getattr(rng.choice(asking.focus), name)
    other = rng.choice([value for value in values if value != many])
    counts = [sum(getattr(thing, name) == value for thing in asking.scene.things) for value in (many, other)]
    if counts[0] == counts[1]:
        return None
    yes, word = rng.random() < 0.5, rng.choice(("more", "fewer"))
    first_is_many = (counts[0] > counts[1]) == (yes == (word == "more"))
    noun = rng.choice(level.nouns)
    phrases = [noun_phrase(level, Description(**{name: value}), noun, plural=True) for value in (many, other)]
    if not first_is_many:
        phrases.reverse()
    return f"Are there {word} {phrases[0]} than {phrases[1]}?", "yes" if yes else "no"


def _larger(asking: Asking) -> tuple[str, str] | None:
    order = list(asking.level.sizes)
    for first, second in _pairs(asking.scene.things, asking.rng):
        bigger = order.index(first.size) - order.index(second.size)
        # A size in the words would answer the question, so it is never named here.
        phrases = _phrases(asking, first, second, without="size")
        if bigger and phrases and (first in asking.focus or second in asking.focus):
            word = asking.rng.choice(("larger", "smaller"))
            return f"Is the {phrases[0]} {word} than the {phrases[1]}?", _yes((bigger > 0) == (word == "larger"))
    return None


def relation(asking: Asking) -> tuple[str, str] | None:
    """`Is the red circle left of the star?` or `Is the red circle above or below the star?`"""
    rng = asking.rng
    for first, second in _pairs(asking.scene.things, rng):
        clear = _clear_relations(asking.level, first, second)
        phrases = _phrases(asking, first, second)
        if not clear or not phrases or not (first in asking.focus or second in asking.focus):
            continue
        axis, before, after, is_before = rng.choice(clear)
        # Six answers, all as frequent: yes, no, left, right, above, below.
        if rng.random() < 1 / 3:
            asks_before = rng.random() < 0.5
            words = before if asks_before else after
            return f"Is the {phrases[0]} {words} the {phrases[1]}?", _yes(asks_before == is_before)
        low, high, pattern = CHOICES[axis]
        words = pattern.format(*rng.sample((low, high), 2))
        return f"Is the {phrases[0]} {words} the {phrases[1]}?", low if is_before else high
    return None


def _phrases(asking: Asking, first: Thing, second: Thing, without: str = "") -> tuple[str, str] | None:
    one, two = asking.reference(first, without), asking.reference(second, without)
    if one is None or two is None:
        return None
    noun = asking.rng.choice(asking.level.nouns)
    return noun_phrase(asking.level, one, noun), noun_phrase(asking.level, two, noun)


def _yes(true: bool) -> str:
    return "yes" if true else "no"


QUESTIONS: dict[str, Callable[[Asking], tuple[str, str] | None]] = {
    "existence": existence,
    "colour": partial(attribute, name="colour"),
    "shape": partial(attribute, name="shape"),
    "count": count,
    "comparison": comparison,
    "relation": relation,
}


def questions(
    level: Level, scene: Scene, numbers: Mapping[str, int], rng: Random, compositional: bool = False
) -> list[dict[str, str]]:
    """Up to `numbers[type]` questions of each type that the scene can be asked, no text twice."""
    held_out = set(level.held_out)
    focus = tuple(t for t in scene.things if not compositional or (t.colour, t.shape) in held_out)
    asking = Asking(level, scene, focus, draw_held_out if compositional else draw_attributes, rng)
    asked: dict[str, dict[str, str]] = {}
    for kind, number in numbers.items():
        wanted = len(asked) + number
        for _ in range(3 * number):
            made = QUESTIONS[kind](asking)
            if made and made[0] not in asked:
                asked[made[0]] = {"question": made[0], "answer": made[1], "type": kind}
            if len(asked) == wanted:
                break
    return list(asked.values())
