"""Draws a scene. Knows outlines, fills, backgrounds and noise; knows nothing of what is said about a scene."""

from __future__ import annotations

import io
import math
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from .scene_world import Level, Scene, Thing

SCALE = 4  # every thing is drawn this many times larger and averaged down, which smooths its edge

Outline = tuple[tuple[float, float], ...]


def _regular(corners: int, radius: float, first: float = -90.0, inner: float | None = None) -> Outline:
    """Corners on a circle, clockwise from `first` degrees; with `inner`, every second one on a smaller circle."""
    radii = [radius if inner is None or index % 2 == 0 else inner for index in range(corners)]
    angles = [math.radians(first + 360 * index / corners) for index in range(corners)]
    return tuple((r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True))


def _heart() -> Outline:
    steps = [2 * math.pi * index / 48 for index in range(48)]
    xs = [16 * math.sin(t) ** 3 for t in steps]
    ys = [-(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) for t in steps]
    return tuple((x / 16.5, (y - 2) / 16.5) for x, y in zip(xs, ys, strict=True))


def _crescent() -> Outline:
    outer = [math.radians(50 + 260 * index / 32) for index in range(33)]
    inner = [math.radians(294.4 - 228.8 * index / 32) for index in range(33)]
    back = [(0.38 + 0.72 * 0.88 * math.cos(a) + 0.0, 0.845 * math.sin(a)) for a in inner]
    return tuple((math.cos(a), math.sin(a)) for a in outer) + tuple(back)


_CROSS = ((-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1))

# In a circle of radius 1 or a little more, chosen so that all look equally large.
OUTLINES: dict[str, Outline] = {
    "circle": _regular(48, 0.96),
    "square": _regular(4, 1.2, first=-135),
    "triangle": tuple((x, y + 0.2) for x, y in _regular(3, 1.22)),
    "star": tuple((x, y + 0.05) for x, y in _regular(10, 1.2, inner=0.5)),
    "heart": _heart(),
    "cross": tuple((x / 3, y / 3) for x, y in _CROSS),
    "hexagon": _regular(6, 1.04),
    "crescent": _crescent(),
}


def draw(level: Level, scene: Scene, rng: Random) -> Image.Image:
    """The scene as an RGB picture, `level.picture_size` square. Later things cover earlier ones."""
    canvas = _background(level, rng)
    for thing in scene.things:
        _draw_thing(canvas, level, thing, rng)
    if level.noise:
        noise = np.random.default_rng(rng.getrandbits(64)).normal(0, level.noise, (canvas.height, canvas.width, 3))
        canvas = Image.fromarray((np.asarray(canvas) + noise).round().clip(0, 255).astype(np.uint8))
    return canvas


def encode(level: Level, picture: Image.Image) -> bytes:
    """The picture's file."""
    file = io.BytesIO()
    picture.save(file, level.picture_format, compress_level=1, quality=92)
    return file.getvalue()


@lru_cache(maxsize=2)
def _grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y from -½ to ½, (1, side, 1) and (side, 1, 1)."""
    line = np.linspace(-0.5, 0.5, side, dtype=np.float32)
    return line[None, :, None], line[:, None, None]


def _background(level: Level, rng: Random) -> Image.Image:
    """A soft gradient between two greys with a hint of colour."""
    low, high = level.background
    ends = [np.array([rng.uniform(low, high)] * 3) + [rng.uniform(-7, 7) for _ in range(3)] for _ in range(2)]
    middle, slope = (ends[0] + ends[1]) / 2, (ends[1] - ends[0]) * 0.7
    angle = rng.uniform(0, 2 * math.pi)
    x, y = _grid(level.picture_size)
    along = math.cos(angle) * x + math.sin(angle) * y  # (side, side, 1)
    shades = middle.astype(np.float32) + along * slope.astype(np.float32)
    return Image.fromarray(shades.clip(0, 255).astype(np.uint8))


def _draw_thing(canvas: Image.Image, level: Level, thing: Thing, rng: Random) -> None:
    side, radius = level.picture_size, thing.radius * level.picture_size
    left, top = (math.floor(centre * side - radius * 1.4) for centre in (thing.x, thing.y))
    box = math.ceil(radius * 2.8) + 1
    turn = math.radians(thing.turn)
    cos, sin = math.cos(turn) * radius, math.sin(turn) * radius
    x0, y0 = thing.x * side - left, thing.y * side - top
    points = [((x0 + x * cos - y * sin) * SCALE, (y0 + x * sin + y * cos) * SCALE) for x, y in OUTLINES[thing.shape]]
    mask = Image.new("L", (box * SCALE, box * SCALE))
    ImageDraw.Draw(mask).polygon(points, fill=255)
    light = rng.uniform(0.92, 1.06)
    red, green, blue = (min(255, round(channel * light)) for channel in level.colours[thing.colour])
    fill = FILLS[thing.texture](box, (red, green, blue), radius, rng)
    canvas.paste(fill, (left, top), mask.reduce(SCALE))


def _second_tone(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """A tone to draw a texture with: darker, or lighter where the colour is dark already."""
    if sum(colour) < 200:
        return tuple(channel + 84 for channel in colour)  # type: ignore[return-value]
    return tuple(round(channel * 0.55) for channel in colour)  # type: ignore[return-value]


def _plain(box: int, colour: tuple[int, int, int], radius: float, rng: Random) -> Image.Image:
    return Image.new("RGB", (box, box), colour)


def _striped(box: int, colour: tuple[int, int, int], radius: float, rng: Random) -> Image.Image:
    tile = Image.new("RGB", (box * SCALE, box * SCALE), colour)
    pen, second = ImageDraw.Draw(tile), _second_tone(colour)
    step, lean = radius * SCALE * 0.5, rng.choice((-1, 0, 1)) * box * SCALE
    start = -abs(lean) + rng.uniform(0, step)
    for index in range(math.ceil((box * SCALE + 2 * abs(lean)) / step)):
        x = start + index * step
        pen.line([(x, 0), (x + lean, box * SCALE)], second, round(step * (0.42 if lean == 0 else 0.3)))
    return tile.reduce(SCALE)


def _dotted(box: int, colour: tuple[int, int, int], radius: float, rng: Random) -> Image.Image:
    tile = Image.new("RGB", (box * SCALE, box * SCALE), colour)
    pen, second = ImageDraw.Draw(tile), _second_tone(colour)
    step = radius * SCALE * 0.52
    x0, y0 = rng.uniform(0, step), rng.uniform(0, step)
    count = math.ceil(box * SCALE / step) + 1
    for row in range(count):
        for column in range(count):
            x, y = x0 + (column - 0.5 * (row % 2)) * step, y0 + (row - 0.5) * step
            pen.ellipse([x - step * 0.24, y - step * 0.24, x + step * 0.24, y + step * 0.24], second)
    return tile.reduce(SCALE)


FILLS = {"plain": _plain, "striped": _striped, "dotted": _dotted}
