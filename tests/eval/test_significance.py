"""Intervals and paired tests against scipy, exact counts and their own promises."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from vlm.eval.metrics.caption import CaptionSet, bleu_from, bleu_of, bleu_statistics
from vlm.eval.metrics.significance import bootstrap, bootstrap_mean, compare_paired, mcnemar, permutation_test

RNG = np.random.default_rng(0)


def test_the_interval_of_a_mean_is_that_of_the_normal_law_for_many_items() -> None:
    scores = RNG.random(4000)
    interval = bootstrap_mean(scores)
    apart = 1.96 * scores.std() / np.sqrt(len(scores))
    assert interval.value == pytest.approx(scores.mean())
    assert (interval.value - interval.low, interval.high - interval.value) == pytest.approx((apart, apart), rel=0.1)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    held = 0
    for seed in range(200):
        interval = bootstrap_mean(np.random.default_rng(seed).random(100) < 0.3)
        held += interval.low <= 0.3 <= interval.high
    assert 0.9 <= held / 200 <= 0.99


def test_equal_seeds_give_equal_intervals() -> None:
    scores = RNG.random(50)
    assert bootstrap_mean(scores) == bootstrap_mean(scores)
    assert bootstrap_mean(scores, seed=1) != bootstrap_mean(scores)
    assert bootstrap_mean([0.5] * 10) == bootstrap_mean([0.5])


def test_a_corpus_metric_is_resampled_from_its_sums() -> None:
    references = [
        ["a red dog sits on the green grass"],
        ["two small cats look at a bird"],
        ["a man rides a horse"],
    ] * 10
    candidates = ["a red dog sits on the grass", "two cats look at a big bird", "a man on a brown horse"] * 10
    captions = CaptionSet(candidates, references)
    rows = bleu_statistics(captions)
    interval = bootstrap(rows, lambda means: bleu_from(means * len(rows))[..., 3])
    assert interval.value == pytest.approx(bleu_of(captions)[0][3])
    assert interval.low < interval.value < interval.high


def test_mcnemar_is_the_exact_binomial_test() -> None:
    for lost, won in ((0, 0), (3, 9), (9, 3), (40, 70), (0, 12), (500, 560)):
        expected = stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
        assert mcnemar(lost, won) == pytest.approx(expected)


def test_the_permutation_test_nears_the_exact_one() -> None:
    differences = np.array([0.3, -0.1, 0.5, 0.2, 0.4, -0.2, 0.1, 0.6])
    flips = np.array(list(itertools.product([-1, 1], repeat=8)))
    exact = np.mean(np.abs(flips @ differences) >= abs(differences.sum()) - 1e-12)
    assert permutation_test(differences) == pytest.approx(exact, abs=0.01)
    assert permutation_test([0.0, 0.0]) == permutation_test([]) == 1.0


def test_the_test_follows_the_scores() -> None:
    a, b = np.array([1.0, 0, 1, 0, 0] * 8), np.array([1.0, 1, 0, 1, 0] * 8)
    paired = compare_paired(a, b)
    assert (paired.test, paired.p) == ("mcnemar", pytest.approx(stats.binomtest(8, 24).pvalue))
    assert paired.difference.value == pytest.approx(0.2)
    assert compare_paired(a * 0.5, b).test == "permutation"
    assert compare_paired(a, a).p == 1.0


def test_what_can_not_be_paired_is_an_error() -> None:
    with pytest.raises(ValueError, match="of the same items"):
        compare_paired([1.0], [1.0, 0.0])
    with pytest.raises(ValueError, match="no scores"):
        bootstrap_mean([])
