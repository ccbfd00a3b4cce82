"""Which words of an English text say what can be seen: colours, numbers, places, sizes and the like; and what is denied.

Knows words. Knows nothing of pictures, samples or what is done with either. Where a word has two meanings, one of them
visual, it counts as visual: `orange`, `right`, `light`.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache

_WORD = re.compile(r"[^\W_]+(?:[’'][^\W_]+)*")
_ENDS = re.compile(r"[.;:!?\n]|\b(?:but|though|although)\b", re.IGNORECASE)

# Kind -> sets of words that say the same, parted by commas. The first word of a set stands for it.
_FACTS = {
    "colour": """red, scarlet, crimson, maroon, burgundy, blue bluish, navy, azure, teal, turquoise, cyan, aqua, green, olive,
        lime, emerald, khaki, yellow, gold golden, amber, orange, peach, coral, salmon, pink, magenta, fuchsia, rose, purple,
        violet, lavender, lilac, indigo, mauve, brown, tan, beige, chestnut, bronze, copper, cream, ivory, white, black,
        ebony, grey gray, silver silvery, charcoal, blond blonde, brunette, ginger, rainbow, colourful colorful, multicoloured
        multicolored, colourless colorless, colour color, hue, shade, tint, coloured colored, pale, pastel, neon, monochrome,
        tone, toned, sepia, rusty""",
    "light": """dark darkness darkly, darker, darkest, bright brightly brightness, brighter, brightest, light lighting,
        lighter, lightest, dim dimly, shiny, glossy, shadow, shade, sunny, sunlit, sunlight, night, nighttime, day, daytime,
        sunset, sunrise, dusk, dawn, evening, morning, overcast, cloudy, lit, unlit, illuminated, glowing, silhouette,
        silhouetted, faded, vivid, transparent""",
    "number": """zero, one single, two twin, three, four, five, six, seven, eight, nine, ten, eleven, twelve dozen, thirteen,
        fourteen, fifteen, sixteen, seventeen, eighteen, nineteen, twenty, thirty, forty, fifty, sixty, seventy, eighty,
        ninety, hundred, thousand, million, first, second, third, fourth, fifth, sixth, seventh, eighth, ninth, tenth, once,
        twice, half, quarter, pair couple, trio, double, triple, both""",
    "quantity": """few, several, many, much, number, count, more, most, fewer, fewest, less, least, all every each, any,
        only, alone, another, other, empty, full, equal equally, same, different, enough, whole, entire, last, next""",
    "side": """left lefthand, leftmost, leftward, right righthand, rightmost, rightward, clockwise, counterclockwise
        anticlockwise, east eastern, west western, mirrored, reversed, backward backwards, lefty, righty""",
    "place": """top topmost, upper uppermost, bottom bottommost, lower, middle, centre center, central, corner, edge, border,
        above, below, beneath, underneath, under, over, behind, front, background, foreground, between, inside, within,
        outside, near, nearest, nearby, close, closest, beside, adjacent, alongside, far, farthest furthest, opposite, around,
        across, along, against, atop, up upward upwards, down downward downwards, north northern, south southern, upright,
        horizontal horizontally, vertical vertically, diagonal diagonally, facing, toward towards, away, side, sideways,
        position, upside, inverted, high, higher, highest, low, lowest""",
    "relation": "on, off, in, into, onto, through, by, at, past, beyond, out, among, with, from, to, where",
    "size": """large big, small, little, tiny, miniature, huge enormous, giant gigantic, massive, medium, tall, short, long,
        wide, broad, narrow, thick, thin, slim, deep, shallow, fat, larger bigger, largest biggest, smaller, smallest, taller,
        tallest, shorter, shortest, longer, longest, wider, widest, size sized, closeup, zoomed""",
    "material": """wood wooden, metal metallic, steel, iron, plastic, glass, brick, stone, concrete, leather, cotton, wool
        woolen woollen, silk, denim, paper, cardboard, rubber, marble, ceramic, porcelain, clay, tile tiled, straw, bamboo,
        wicker, velvet, fur furry, grass grassy, sand sandy, snow snowy, water, ice icy, dirt, muddy mud, rock rocky""",
    "shape": """circle circular, square, triangle triangular, rectangle rectangular, oval, round rounded, star, heart, cross,
        hexagon hexagonal, crescent, cube, sphere, cylinder, cone, diamond, straight, curved, pointed, flat, stripe striped,
        dot dotted, spot spotted, checkered chequered checked, plaid, plain, patterned, shape shaped""",
    "writing": """letter, word, text, writing, written, says, say, saying, reads, read, reading, sign, label labeled labelled,
        logo, brand, printed, print, spelled spelt, caption captioned, digit, clock, watch, time, title, name named, license
        licence, plate, keyboard, book, newspaper, magazine, screen, handwriting, alphabet, slogan, jersey, poster""",
}
KINDS = tuple(_FACTS)
_NUMERALS = {
    str(value): word for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_ORDINALS = {"1st": "first", "2nd": "second", "3rd": "third", "4th": "fourth", "5th": "fifth"}
_NEGATIONS = frozenset(
    "no not never none nobody nothing nowhere neither nor without cannot lacks lacking absent except".split()
)


def _listed() -> dict[str, frozenset[str]]:
    said: dict[str, set[str]] = {}
    for kind, sets in _FACTS.items():
        for same in sets.split(","):
            first, *others = same.split()
            for word in (first, *others):
                said.setdefault(word, set()).add(f"{kind}:{first}")
    return {word: frozenset(facts) for word, facts in said.items()}


_SAID = _listed()


def words(text: str) -> list[re.Match[str]]:
    """The words of a text with their places; a hyphen parts two words, an apostrophe does not."""
    return list(_WORD.finditer(text))


@lru_cache(maxsize=1 << 16)
def said_by(word: str) -> frozenset[str]:
    """What a word says that can be seen, each as `kind:word` with one word for all that say the same: `size:large`.

    Kinds are those of `KINDS`. Plurals count, and reddish is red; figures are numbers whatever they count.
    """
    lower = word.lower().replace("’", "'").removesuffix("'s")
    lower = _NUMERALS.get(lower) or _ORDINALS.get(lower) or lower
    if lower[:1].isdigit():
        return frozenset({f"number:{lower}"})
    stems = [lower, *(lower.removesuffix(end) for end in ("s", "es", "ish", "dish")), re.sub("ish$", "e", lower)]
    return next((_SAID[stem] for stem in stems if stem in _SAID), frozenset())


def facts(text: str, *kinds: str) -> Counter[str]:
    """How often a text says what of these kinds; every negation counts as `not`, whatever its word."""
    told: Counter[str] = Counter()
    for match in words(text):
        told.update(said for said in said_by(match[0]) if said.partition(":")[0] in kinds)
        told.update(["not"] * is_negation(match[0]))
    return told


def names(text: str, *kinds: str) -> bool:
    """Whether any word of a text is of one of these kinds."""
    return any(said.partition(":")[0] in kinds for match in words(text) for said in said_by(match[0]))


def is_negation(word: str) -> bool:
    """Whether a word denies: `no`, `without`, `isn't`."""
    lower = word.lower().replace("’", "'")
    return lower in _NEGATIONS or lower.endswith("n't")


def negated(text: str) -> list[bool]:
    """For each of `words(text)` whether it denies or stands in the scope of what does.

    The scope runs to the end of the sentence or to `but`, as in NegEx (Chapman et al. 2001), but across commas, since what
    is listed after `no` is denied too.
    """
    ends = [match.start() for match in _ENDS.finditer(text)]
    scope, denied = -1, []
    for match in words(text):
        if is_negation(match[0]):
            scope = next((end for end in ends if end > match.start()), len(text))
        denied.append(match.start() < scope)
    return denied
