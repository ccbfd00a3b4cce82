"""What a picture is dropped for: size, shape, and nothing to see; and what comes near that and stays."""

from __future__ import annotations

import io
from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vlm.data_tools.clean_image import fault
from vlm.data_tools.clean_rules import Reason, Rules, load_rules
from vlm.data_tools.scene_drawing import draw
from vlm.data_tools.scene_world import LEVELS
from vlm.data_tools.scenes import make_scene
from vlm.images import open_image

RULES = Rules()


def noise(level: float, spread: float, size: tuple[int, int] = (320, 200)) -> Image.Image:
    drawn = np.random.default_rng(0).normal(level, spread, (size[1], size[0], 3))
    return Image.fromarray(drawn.round().clip(0, 255).astype(np.uint8))


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return open_image(file.getvalue())


def drawing(side: int, mark: Callable[[ImageDraw.ImageDraw, int], None], ground: str = "white") -> Image.Image:
    image = Image.new("RGB", (side, side), ground)
    mark(ImageDraw.Draw(image), side)
    return image


def circle(pen: ImageDraw.ImageDraw, side: int) -> None:
    pen.ellipse([side * 0.3, side * 0.3, side * 0.7, side * 0.7], outline="black", width=1)


def stroke(pen: ImageDraw.ImageDraw, side: int) -> None:
    pen.line([side * 0.2, side * 0.5, side * 0.8, side * 0.6], fill="black", width=1)


def disc(pen: ImageDraw.ImageDraw, side: int) -> None:
    pen.ellipse([side * 0.45, side * 0.45, side * 0.55, side * 0.55], fill="#777777")


def border(pen: ImageDraw.ImageDraw, side: int) -> None:
    pen.rectangle([0, 0, side - 1, side - 1], outline="#dddddd")


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((31, 31), Reason.SMALL),
        ((32, 32), None),
        ((2000, 31), Reason.SMALL),
        ((40, 200), None),
        ((40, 201), Reason.ASPECT),
        ((201, 40), Reason.ASPECT),
        ((500, 100), None),
    ],
)
def test_size_and_shape(size: tuple[int, int], reason: Reason | None) -> None:
    assert fault(noise(128, 60, size), RULES) == reason


BLANK = {
    "white": Image.new("RGB", (200, 200), "white"),
    "black": Image.new("RGB", (200, 200)),
    "one colour": Image.new("RGB", (200, 300), "#c04080"),
    "a lens cap in the dark": noise(8, 10),
    "grey with grain": noise(128, 8),
    "grey with the blocks of a JPEG": as_jpeg(noise(128, 8), 20),
    "a pale border": drawing(200, border, "#eee"),
    "six levels of sky": Image.fromarray(np.tile(np.linspace(124, 130, 300).astype(np.uint8), (200, 1))).convert("RGB"),
}


@pytest.mark.parametrize("name", BLANK)
def test_nothing_to_see(name: str) -> None:
    assert fault(BLANK[name], RULES) == Reason.UNIFORM
    assert fault(BLANK[name], load_rules(None, ["images.min_contrast=0"])) is None


@pytest.mark.parametrize("side", [64, 224, 512, 1024, 2048])
@pytest.mark.parametrize("mark", [circle, stroke, disc])
def test_a_hairline_on_white_is_something_to_see(side: int, mark: Callable[[ImageDraw.ImageDraw, int], None]) -> None:
    assert fault(drawing(side, mark), RULES) is None


def test_colours_of_one_lightness_are_something_to_see() -> None:
    image = Image.new("RGB", (64, 64), (120, 0, 0))
    image.paste((0, 61, 0), (10, 10, 50, 50))
    assert len(set(image.convert("L").tobytes())) == 1
    assert fault(image, RULES) is None


@pytest.mark.parametrize("level", LEVELS.values(), ids=list(LEVELS))
def test_drawn_scenes_stay(level) -> None:
    for index in range(40):
        scene, _ = make_scene(level, "train", 0, index)
        assert fault(draw(level, scene, Random(index)), RULES) is None
