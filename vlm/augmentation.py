"""Pictures changed at training time, and only in what their text says nothing about.

Knows which change would make which words untrue, and how each is done to a picture. Knows nothing of samples, batches or
models. Texts are taken to be English; one with other letters than English has is taken to speak of everything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from vlm.errors import UsageError
from vlm.wording import names

# What a text must not speak of if a picture is to be changed so.
MIRROR = ("side", "writing")
CROP = ("side", "writing", "place", "number", "quantity", "size")
COLOUR = ("colour",)
LIGHT = ("colour", "light")
_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_QUOTED = re.compile(r"[\"“”«»„]|(?<!\w)['‘][^'’]+['’](?!\w)")
_EXISTENCE = re.compile(
    r"\b(?:is|are|was|were) there\b|\b(?:see|show|shows|shown|visible|contain|contains)\b.*\?", re.I
)


@dataclass(frozen=True)
class Augmentation:
    """Random changes of the pictures of one sample; all of them are changed alike, since texts compare them.

    mirror: probability of a mirror image, where no text names a side or what is written. crop: largest share of the area
    that is cut off, the aspect kept, where none names a place, number or size or asks what is there. colour: largest turn
    of the hue, as a share of the half circle, and change of the saturation, as a share of it, where none names a colour.
    light: largest change of brightness and contrast, as a share of each, where none names a colour or light. All from 0
    (never) to 1, and crop below 1; raises UsageError for others.
    """

    mirror: float = 0.0
    crop: float = 0.0
    colour: float = 0.0
    light: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= 1 or (name == "crop" and value == 1):
                raise UsageError(f"{name} is {value:g}; give a share from 0 to {'below 1' if name == 'crop' else '1'}")

    def __call__(
        self, images: Sequence[Image.Image], texts: Sequence[str], rng: np.random.Generator
    ) -> list[Image.Image]:
        """RGB pictures of a sample, and everything said of them -> as many pictures; a crop's are smaller.

        Where a text forbids a change, what it would change is bit by bit as it was. Every call draws as many numbers from
        `rng`, so what one sample's texts forbid changes nothing for the next.
        """
        drawn = rng.random(8)
        mirror = drawn[0] < self.mirror and _allowed(MIRROR, texts)
        crop = self.crop > 0 and _allowed(CROP, texts) and not any(map(_EXISTENCE.search, texts))
        colour = self.colour > 0 and _allowed(COLOUR, texts)
        light = self.light > 0 and _allowed(LIGHT, texts)
        changed = list(images)
        if crop:
            changed = [_cropped(image, 1 - self.crop * drawn[1], drawn[2], drawn[3]) for image in changed]
        if mirror:
            changed = [ImageOps.mirror(image) for image in changed]
        if colour:
            changed = [_recoloured(image, *(self.colour * (2 * drawn[4:6] - 1))) for image in changed]
        if light:
            changed = [_relit(image, *(self.light * (2 * drawn[6:8] - 1))) for image in changed]
        return changed


def _allowed(kinds: Sequence[str], texts: Sequence[str]) -> bool:
    """Whether no text speaks of what is of these kinds; a quotation is of writing."""
    return not any(
        names(text, *kinds) or ("writing" in kinds and _QUOTED.search(text)) or _other_letters(text) for text in texts
    )


def _other_letters(text: str) -> bool:
    return not text.isascii() and any(letter.isalpha() and not letter.isascii() for letter in text)


def _cropped(image: Image.Image, area: float, x: float, y: float) -> Image.Image:
    """A part of the picture of the same aspect; x and y from 0 to 1 say where in the room that is left."""
    width, height = (max(1, round(side * math.sqrt(area))) for side in image.size)
    left, top = round((image.width - width) * x), round((image.height - height) * y)
    return image.crop((left, top, left + width, top + height))


def _recoloured(image: Image.Image, turn: float, saturation: float) -> Image.Image:
    """The chroma plane of YIQ turned and stretched, which keeps every grey and the brightness; one matrix for each pixel."""
    cosine, sine = (1 + saturation) * math.cos(math.pi * turn), (1 + saturation) * math.sin(math.pi * turn)
    chroma = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
    matrix = np.linalg.inv(_YIQ) @ chroma @ _YIQ
    rows = np.concatenate([matrix, np.zeros((3, 1))], axis=1)
    return image.convert("RGB", tuple(rows.ravel().tolist()))


def _relit(image: Image.Image, brightness: float, contrast: float) -> Image.Image:
    return ImageEnhance.Contrast(ImageEnhance.Brightness(image).enhance(1 + brightness)).enhance(1 + contrast)
