"""How sure a score is, and whether two models differ. Knows scores of items; nothing of tasks, models or files.

Resampling is seeded: the same scores give the same interval. Items are drawn as counts (how often each item stands in a
resample), so that a mean of all resamples is one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2_000
FLIPS = 10_000
LEVEL = 0.95
BLOCK = 1 << 22  # numbers drawn at a time
Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Interval:
    """A score of a set, and the ends of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """Two models on the same items: b - a with its interval, and how likely a difference this large is by chance.

    test: "mcnemar" (exact, for scores that are 0 or 1) or "permutation".
    """

    difference: Interval
    p: float
    test: str


def bootstrap_mean(scores: Sequence[float] | np.ndarray, seed: int = 0) -> Interval:
    """The mean of scores (N,) with its percentile bootstrap interval (Efron & Tibshirani 1993, ch. 13), 95 %.

    Raises ValueError for no scores.
    """
    return bootstrap(np.asarray(scores, dtype=np.float64)[:, None], lambda sums: sums[:, 0], seed)


def bootstrap(rows: np.ndarray, statistic: Statistic, seed: int = 0) -> Interval:
    """A corpus metric with its bootstrap interval, where it follows from sums over items.

    rows: (N, S), what each item adds. statistic: means of the rows (…, S) to the metric (…,); a metric of sums, such as
    BLEU, gets its sums as N × means: `lambda means: bleu_from(means * N)[:, 3]`. Raises ValueError for no rows.
    """
    if not len(rows):
        raise ValueError("no scores to resample")
    drawn = np.concatenate([statistic(weights @ rows / len(rows)) for weights in _resamples(len(rows), seed)])
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(statistic(rows.mean(axis=0)[None])[0]), float(low), float(high))


def _resamples(items: int, seed: int) -> Iterator[np.ndarray]:
    """How often each item stands in each of `RESAMPLES` samples drawn with replacement; (some, items) a time."""
    rng = np.random.default_rng(seed)
    left, step = RESAMPLES, max(1, BLOCK // items)
    while left:
        some = min(step, left)
        drawn = rng.integers(0, items, (some, items)) + np.arange(some)[:, None] * items
        yield np.bincount(drawn.ravel(), minlength=some * items).reshape(some, items).astype(np.float64)
        left -= some


def compare_paired(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, seed: int = 0) -> Paired:
    """Scores of two models on the same items, (N,) each, in the same order. Raises ValueError for lengths that differ."""
    ours, theirs = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if ours.shape != theirs.shape or ours.ndim != 1:
        raise ValueError(f"paired scores are of the same items; got shapes {ours.shape} and {theirs.shape}")
    difference = bootstrap_mean(theirs - ours, seed)
    if np.isin(ours, (0, 1)).all() and np.isin(theirs, (0, 1)).all():
        lost, won = int((ours > theirs).sum()), int((theirs > ours).sum())
        return Paired(difference, mcnemar(lost, won), "mcnemar")
    return Paired(difference, permutation_test(theirs - ours, seed), "permutation")


def mcnemar(lost: int, won: int) -> float:
    """Two-sided exact p (McNemar 1947, the binomial form) of `lost` items right only before and `won` right only after."""
    changed, fewer = lost + won, min(lost, won)
    terms = [_log_binomial(changed, k) - changed * math.log(2) for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(math.exp(term) for term in terms))


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def permutation_test(differences: Sequence[float] | np.ndarray, seed: int = 0) -> float:
    """Two-sided p of a mean difference (N,) where each item's sign is as likely either way (Fisher 1935, § 21).

    By `FLIPS` random draws of signs, the one at hand counted among them: never below 1 / (FLIPS + 1).
    """
    changes = np.asarray(differences, dtype=np.float64)
    changes = changes[changes != 0]
    if not len(changes):
        return 1.0
    rng, seen, left = np.random.default_rng(seed), 0, FLIPS
    bound = abs(changes.sum()) - 1e-9 * np.abs(changes).sum()  # equal but for rounding counts as equal
    while left:
        some = min(max(1, BLOCK // len(changes)), left)
        signs = rng.integers(0, 2, (some, len(changes)), dtype=np.int8) * 2.0 - 1.0
        seen += int((np.abs(signs @ changes) >= bound).sum())
        left -= some
    return (seen + 1) / (FLIPS + 1)
