"""LIME: which parts of an input a score depends on, by a linear model of it about that input (Ribeiro et al. 2016).

Knows which parts are kept and which left out, and the scores of that. Knows nothing of pictures, words or models.

Shapes: F parts, n samples. A sample is a row of F, True where the part is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vlm.errors import UsageError

WIDTH = 0.25  # σ of the kernel, as the authors' own code has it
RIDGE = 1e-9  # of the samples' total weight: it decides only where the samples do not


@dataclass(frozen=True)
class LinearModel:
    """score ≈ intercept + Σ weights[f] over the parts f that are kept.

    fidelity: weighted R² over the samples, 1 where all of the score is explained.
    """

    weights: np.ndarray  # (F,) float64
    intercept: float
    fidelity: float


def lime(parts: int, score: Callable[[np.ndarray], np.ndarray], samples: int, seed: int) -> LinearModel:
    """The linear model of a score about the whole input.

    score: (n, F) bool -> (n,), asked once, for samples that differ; the first keeps everything. The same seed draws the same.
    Raises UsageError for too few samples to tell so many parts and an intercept apart.
    """
    if samples <= parts:
        raise UsageError(
            f"{samples} samples do not tell {parts} parts apart; take at least {parts + 1}, or fewer parts"
        )
    kept, counts = distinct(draw(parts, samples, seed))
    return fit(kept, np.asarray(score(kept), np.float64), counts * kernel(kept))


def draw(parts: int, samples: int, seed: int) -> np.ndarray:
    """(n, F) bool: everything, and then each part kept or not by a fair coin."""
    kept = np.random.default_rng(seed).random((samples, parts)) < 0.5
    kept[0] = True
    return kept


def distinct(kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows that differ, in the order of their first appearance, and how often each is there."""
    _, first, counts = np.unique(kept, axis=0, return_index=True, return_counts=True)
    order = np.argsort(first)
    return kept[first[order]], counts[order]


def kernel(kept: np.ndarray) -> np.ndarray:
    """(n, F) -> (n,): exp(-D² / σ²), D the cosine distance to the row that keeps everything (section 3.4)."""
    distance = 1 - np.sqrt(kept.mean(axis=1))  # the cosine of k ones to F ones is √(k / F)
    return np.exp(-((distance / WIDTH) ** 2))


def fit(kept: np.ndarray, scores: np.ndarray, importance: np.ndarray) -> LinearModel:
    """Weighted least squares with an intercept, and a ridge that picks the smallest weights where several are as good."""
    share = importance / importance.sum()
    middle, mean = share @ kept, share @ scores
    parts, rest = kept - middle, scores - mean
    normal = (parts * share[:, None]).T @ parts + RIDGE * np.eye(kept.shape[1])
    weights = np.linalg.solve(normal, parts.T @ (share * rest))
    spread, missed = share @ rest**2, share @ (rest - parts @ weights) ** 2
    # What does not move at all is explained whole; beneath that lies the rounding of the scores themselves.
    still = spread <= (np.finfo(np.float32).eps * max(1.0, abs(mean))) ** 2
    return LinearModel(weights, float(mean - middle @ weights), 1.0 if still else float(1 - missed / spread))
