"""Recall of image–text retrieval, and what duplicate texts allow. Knows similarities, not where they come from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

RANKS = (1, 5, 10)
BLOCK = 1 << 24  # similarities compared at a time


def recall_both_ways(
    similarity: np.ndarray, ranks: Sequence[int] = RANKS, image_of: Sequence[int] | np.ndarray | None = None
) -> dict[str, float]:
    """R@k in [0, 1] from the similarities (N images, M texts), text j belonging to image `image_of[j]`, (M,) in 0 … N-1.

    The names are `image_to_text_R@k`, a hit where any text of the image is among the k nearest, and
    `text_to_image_R@k`, a hit where the text's image is; as COCO and Flickr30k are scored with five captions a picture
    (Karpathy & Fei-Fei 2015). Without `image_of` the matrix is square, row i belonging to column i.
    Raises ValueError for a matrix that does not fit, and for an image without text.
    """
    similarity = np.asarray(similarity)
    if image_of is None and (similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]):
        raise ValueError(f"need a square similarity of image–text pairs; got shape {similarity.shape}")
    owner = np.arange(len(similarity)) if image_of is None else np.asarray(image_of)
    if similarity.ndim != 2 or not similarity.size or similarity.shape[1] != len(owner):
        raise ValueError(f"need similarities (images, texts) with {len(owner)} texts; got shape {similarity.shape}")
    textless = np.setdiff1d(np.arange(len(similarity)), owner)
    if len(textless) or owner.min() < 0 or owner.max() >= len(similarity):
        raise ValueError(f"each of {len(similarity)} images needs a text and each text one; {len(textless)} have none")
    chances = {k: (chance_of_any_hit(similarity, owner, k), chance_of_hit(similarity.T, owner, k)) for k in ranks}
    names = ("image_to_text", "text_to_image")
    return {f"{name}_R@{k}": float(chances[k][way].mean()) for way, name in enumerate(names) for k in ranks}


def chance_of_hit(similarity: np.ndarray, own: np.ndarray, k: int) -> np.ndarray:
    """For each row of (N, M) the chance that column `own` (N,) is among its k most similar ones; (N,) in [0, 1].

    1 or 0 where no similarities tie; equally similar columns are taken to stand in random order, so that a model which
    cannot tell two texts apart gains nothing from the order they came in. NaN is less similar than anything.
    """
    chances = np.empty(len(similarity))
    for rows in _blocks(similarity):
        block = _no_nan(similarity[rows])
        wanted = np.take_along_axis(block, own[rows, None], axis=1)
        better = (block > wanted).sum(axis=1)
        tied = (block == wanted).sum(axis=1)  # its own included
        chances[rows] = np.clip((k - better) / tied, 0.0, 1.0)
    return chances


def chance_of_any_hit(similarity: np.ndarray, owner: np.ndarray, k: int) -> np.ndarray:
    """For each row i of (N, M) the chance that some column j with `owner[j]` = i is among its k most similar; (N,).

    Ties and NaN as in `chance_of_hit`: of t columns that tie for s places, o of them the row's own, all own ones miss
    with chance C(t - o, s) / C(t, s).
    """
    chances = np.empty(len(similarity))
    for rows in _blocks(similarity):
        block = _no_nan(similarity[rows])
        own = owner[None, :] == np.arange(len(similarity))[rows, None]
        best = np.where(own, block, -np.inf).max(axis=1, keepdims=True)
        tied = block == best
        places = np.clip(k - (block > best).sum(axis=1), 0, None)
        chances[rows] = _chance_of_a_place((tied & own).sum(axis=1), tied.sum(axis=1), places)
    return chances


def _chance_of_a_place(mine: np.ndarray, all_: np.ndarray, places: np.ndarray) -> np.ndarray:
    """1 - C(all - mine, places) / C(all, places), the hypergeometric law, for mine ≥ 1; (N,) each."""
    miss = np.ones(len(mine))
    for one in range(int(mine.max())):
        left = np.clip(all_ - places - one, 0, None) / np.maximum(1, all_ - one)
        miss *= np.where(one < mine, left, 1.0)
    return np.where(mine == 1, np.minimum(places / all_, 1.0), 1.0 - miss)  # the same, but for rounding


def _blocks(similarity: np.ndarray) -> list[slice]:
    step = max(1, BLOCK // similarity.shape[1])
    return [slice(start, start + step) for start in range(0, len(similarity), step)]


def _no_nan(block: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(block), -np.inf, block)


def recall_ceiling(texts: Sequence[Hashable], k: int) -> float:
    """The highest R@k that any model can reach, either way, on pairs with these texts.

    Of m pictures that share one text at most k can be found by it: sum of min(m, k) over groups of equal texts, / N.
    """
    return sum(min(count, k) for count in Counter(texts).values()) / len(texts)
