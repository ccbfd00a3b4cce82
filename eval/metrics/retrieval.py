"""Recall of image–text retrieval, and what duplicate texts allow. Knows similarities, not where they come from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

RANKS = (1, 5, 10)


def recall_both_ways(similarity: np.ndarray, ranks: Sequence[int] = RANKS) -> dict[str, float]:
    """R@k in [0, 1] of N pairs from their similarities (N images, N texts), row i belonging to column i.

    The names are `image_to_text_R@k` and `text_to_image_R@k`. Raises ValueError unless the matrix is square.
    """
    similarity = np.asarray(similarity, dtype=np.float64)
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1] or not len(similarity):
        raise ValueError(f"need a square similarity of image–text pairs; got shape {similarity.shape}")
    pairs = np.arange(len(similarity))
    return {
        f"{name}_R@{k}": float(chance_of_hit(table, pairs, k).mean())
        for name, table in (("image_to_text", similarity), ("text_to_image", similarity.T))
        for k in ranks
    }


def chance_of_hit(similarity: np.ndarray, own: np.ndarray, k: int) -> np.ndarray:
    """For each row of (N, M) the chance that column `own` (N,) is among its k most similar ones; (N,) in [0, 1].

    1 or 0 where no similarities tie; equally similar columns are taken to stand in random order, so that a model which
    cannot tell two texts apart gains nothing from the order they came in. NaN is less similar than anything.
    """
    similarity = np.where(np.isnan(similarity), -np.inf, similarity)
    wanted = np.take_along_axis(similarity, own[:, None], axis=1)
    better = (similarity > wanted).sum(axis=1)
    tied = (similarity == wanted).sum(axis=1)  # its own included
    return np.clip((k - better) / tied, 0.0, 1.0)


def recall_ceiling(texts: Sequence[Hashable], k: int) -> float:
    """The highest R@k that any model can reach, either way, on pairs with these texts.

    Of m pictures that share one text at most k can be found by it: sum of min(m, k) over groups of equal texts, / N.
    """
    return sum(min(count, k) for count in Counter(texts).values()) / len(texts)
