"""LIME: its kernel and its least squares against float64 and numpy's own solver, and a truth that it has to find."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vlm.errors import UsageError
from vlm.lime import RIDGE, WIDTH, distinct, draw, fit, kernel, lime


def scores_of(seed: int = 0, samples: int = 60, parts: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random samples, scores and importances."""
    rng = np.random.default_rng(seed)
    return rng.random((samples, parts)) < 0.5, rng.normal(size=samples), rng.random(samples) + 0.01


def test_the_kernel_is_the_formula():
    kept = draw(6, 40, seed=3)
    for row, found in zip(kept, kernel(kept), strict=True):
        cosine = sum(row) / (math.sqrt(sum(row)) * math.sqrt(6)) if any(row) else 0.0
        assert found == pytest.approx(math.exp(-((1 - cosine) ** 2) / WIDTH**2), rel=1e-12)
    assert kernel(kept)[0] == 1.0


def test_the_fit_is_weighted_least_squares():
    kept, scores, importance = scores_of()
    root = np.sqrt(importance / importance.sum())[:, None]
    design = np.hstack([kept, np.ones((len(kept), 1))]) * root
    ridge = np.hstack([math.sqrt(RIDGE) * np.eye(7), np.zeros((7, 1))])
    expected = np.linalg.lstsq(np.vstack([design, ridge]), np.append(root[:, 0] * scores, np.zeros(7)))[0]
    found = fit(kept, scores, importance)
    np.testing.assert_allclose([*found.weights, found.intercept], expected, rtol=1e-9, atol=1e-12)
    missed = importance @ (scores - kept @ expected[:7] - expected[7]) ** 2
    spread = importance @ (scores - np.average(scores, weights=importance)) ** 2
    assert found.fidelity == pytest.approx(1 - missed / spread, rel=1e-9) and 0 < found.fidelity < 0.5


def test_parts_that_samples_do_not_tell_apart_share_what_they_add():
    kept = np.array([[True, True], [False, False], [True, True]])
    found = fit(kept, np.array([3.0, 1.0, 3.0]), np.ones(3))
    np.testing.assert_allclose(found.weights, [1.0, 1.0], rtol=1e-6)


@pytest.mark.parametrize("parts", [1, 2, 5, 49])
def test_a_linear_truth_is_found(parts):
    truth = np.random.default_rng(1).normal(size=parts)
    truth[parts // 2] = 0.0 if parts > 1 else truth[0]
    found = lime(parts, lambda kept: kept @ truth - 4.0, samples=400, seed=0)
    np.testing.assert_allclose(found.weights, truth, rtol=2e-2, atol=1e-5)
    assert found.intercept == pytest.approx(-4.0, abs=2e-2) and found.fidelity == pytest.approx(1.0, abs=1e-3)


def test_a_score_that_nothing_moves_is_explained_by_nothing():
    found = lime(5, lambda kept: np.full(len(kept), -2.5) + 1e-8 * kept[:, 0], samples=50, seed=0)
    assert np.abs(found.weights).max() < 1e-7 and found.fidelity == 1.0 and found.intercept == pytest.approx(-2.5)


def test_what_is_no_sum_is_told_in_part():
    """Either of two parts is enough: fidelity says that no sum of weights is all of the truth."""
    found = lime(4, lambda kept: (kept[:, 0] | kept[:, 1]).astype(float), samples=400, seed=0)
    kept, counts = distinct(draw(4, 400, seed=0))
    near = fit(kept, (kept[:, 0] | kept[:, 1]).astype(float), counts * kernel(kept))
    assert np.array_equal(found.weights, near.weights), "samples count by how near they are"
    assert 0.2 < found.fidelity < 0.9 and found.weights[:2].min() > 0.1 and np.abs(found.weights[2:]).max() < 0.05


def test_samples_come_of_the_seed_and_are_scored_once():
    asked = []

    def score(kept: np.ndarray) -> np.ndarray:
        asked.append(kept)
        return kept.sum(axis=1).astype(float)

    first, again, other = (lime(3, score, samples=100, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.weights, again.weights) and not np.array_equal(first.weights, other.weights)
    assert asked[0].all(axis=1)[0] and len(asked[0]) == len(np.unique(asked[0], axis=0)) == 8
    kept, counts = distinct(draw(3, 100, seed=1))
    assert np.array_equal(kept, asked[0]) and counts.sum() == 100


def test_too_few_samples():
    with pytest.raises(UsageError, match="8 samples do not tell 8 parts apart; take at least 9, or fewer parts"):
        lime(8, lambda kept: kept.sum(axis=1), samples=8, seed=0)
