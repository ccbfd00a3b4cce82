"""Why a model answered as it did: what each region of the picture and each word of the question was worth to its answer, and
where it looked.

Knows how a picture loses regions and a question words. Knows nothing of the linear model (`vlm.lime`), of attention
(`vlm.looking`), or of how all this is shown (`vlm.explain_page`).

Regions and words have a linear model each: with the whole question while regions are left out, with the whole picture while
words are. Shapes: H, W pixels; R regions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vlm.errors import UsageError
from vlm.images import open_image
from vlm.lime import lime
from vlm.looking import WORD, Look, Talker, looks, seen_part
from vlm.processing import user_turn


class Answerer(Talker, Protocol):
    """What of `vlm.api.VLM` is asked here."""

    def generate(self, messages: Any, **options: Any) -> Any: ...

    def loglikelihood(
        self, conversations: Sequence[Sequence[dict[str, Any]]], *, batch_size: int = 32
    ) -> list[tuple[float, int]]: ...


@dataclass(frozen=True)
class Explanation:
    """An answer, and what it hung on. Weights are natural logarithms: what the part adds to log p(answer) where it is kept.

    log_probability: of the answer with its end, given the whole picture and the whole question.
    regions: (H, W) int, the number of each pixel's region. region_weights: (R,) float64.
    words: of the question, with the white space before each, and their weights.
    looks: the words of the answer, each with a map of where the adapters looked for it, over `seen`, the part of the picture
    that the model is given.
    region_fidelity, word_fidelity: weighted R² of the two linear models. samples, seed: of each.
    """

    question: str
    answer: str
    log_probability: float
    picture: Image.Image
    regions: np.ndarray
    region_weights: np.ndarray
    words: list[tuple[str, float]]
    looks: list[Look]
    seen: Image.Image
    region_fidelity: float
    word_fidelity: float
    samples: int
    seed: int


def explain(
    talker: Answerer,
    image: Any,
    question: str,
    *,
    grid: int = 7,
    samples: int = 400,
    seed: int = 0,
    max_new_tokens: int = 64,
    batch_size: int = 32,
) -> Explanation:
    """Explain the answer that the model gives to a question about a picture, by LIME (Ribeiro et al. 2016) and attention.

    Regions are the fields of a `grid` × `grid` division; one that is left out takes the picture's mean colour. A word that is
    left out is gone, with the space before it. Raises UsageError for an empty question, a picture that cannot be read, fewer
    samples than regions or words and one more, a grid finer than the picture, and for encoder families, which do not answer.
    """
    words = [found[0] for found in WORD.finditer(question)]
    if not words:
        raise UsageError("the question is empty; write at least one word")
    picture = open_image(image)
    regions = divided(picture.height, picture.width, grid)
    most, what = max((grid * grid, "regions"), (len(words), "words"))
    if samples <= most:
        raise UsageError(
            f"{samples} samples do not tell {most} {what} apart; take at least {most + 1}, or a smaller grid"
        )
    asked = user_turn([picture], question)
    answer = talker.generate(asked, max_new_tokens=max_new_tokens, batch_size=batch_size)
    reply = {"role": "assistant", "content": answer}

    def score(turns: Iterator[list[dict[str, Any]]]) -> np.ndarray:
        told: list[float] = []
        while part := [[*turn, reply] for turn in islice(turns, batch_size)]:  # no more pictures are held at once
            told += [value for value, _ in talker.loglikelihood(part, batch_size=batch_size)]
        return np.array(told)

    by_region = lime(
        grid * grid,
        lambda kept: score(user_turn([without(picture, regions, row)], question) for row in kept),
        samples,
        seed,
    )
    by_word = lime(
        len(words),
        lambda kept: score(user_turn([picture], remaining(words, row)) for row in kept),
        samples,
        seed,
    )
    return Explanation(
        question=question,
        answer=answer,
        log_probability=float(score(iter([asked]))[0]),
        picture=picture,
        regions=regions,
        region_weights=by_region.weights,
        words=list(zip(words, by_word.weights.tolist(), strict=True)),
        looks=looks(talker, asked, answer),
        seen=seen_part(talker.processor, picture),
        region_fidelity=by_region.fidelity,
        word_fidelity=by_word.fidelity,
        samples=samples,
        seed=seed,
    )


def divided(height: int, width: int, grid: int) -> np.ndarray:
    """(H, W) int: the number of each pixel's field, row by row; fields differ by a pixel at most in each direction."""
    if not 1 <= grid <= min(height, width):
        raise UsageError(f"grid is {grid} and the picture has {width}×{height} pixels; take 1 to {min(height, width)}")
    rows, columns = (np.arange(size) * grid // size for size in (height, width))
    return rows[:, None] * grid + columns


def without(picture: Image.Image, regions: np.ndarray, kept: np.ndarray) -> Image.Image:
    """The picture with the regions that are not kept, of (R,) bool, in its mean colour."""
    pixels = np.asarray(picture)
    mean = pixels.mean(axis=(0, 1)).round().astype(np.uint8)
    return Image.fromarray(np.where(kept[regions][..., None], pixels, mean))


def remaining(words: Sequence[str], kept: np.ndarray) -> str:
    """The question of the words that are kept, of (words,) bool."""
    return "".join(word for word, is_kept in zip(words, kept, strict=True) if is_kept).strip()
