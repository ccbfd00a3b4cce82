"""Near texts: their words and n-grams, how near one edit leaves them, and the keys that they share."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from near_samples import grams, jaccard, mixed

from vlm.data_tools.dedup_text import band_count, band_rows, jaccards, rare_keys, shingle, text_bands, words


def test_words_are_the_same_however_they_are_written():
    assert words("A Red-Circle,  on\tTop!") == words("a red circle on top") == ["a", "red", "circle", "on", "top"]
    assert words("Ｃａｆé №") == words("CAFE\u0301 no")  # full width and one sign; letter and accent
    assert words("红色圆圈") == list("红色圆圈")
    assert words("किताब है") == ["किताब", "है"]


def test_sets_are_the_judges():
    texts = [text for text, _ in mixed(80, 1)]
    starts, values = shingle(texts)
    assert np.diff(starts).tolist() == [len(grams(text)) for text in texts]
    sets = [set(values[start:stop].tolist()) for start, stop in itertools.pairwise(starts.tolist())]
    for one, other in itertools.combinations(range(80), 2):
        assert len(sets[one] & sets[other]) == len(grams(texts[one]) & grams(texts[other]))
    row = np.arange(79)
    lengths = np.diff(starts)
    similar = jaccards((starts[:80], values[: starts[79]]), (starts[1:] - starts[1], values[starts[1] :]))
    assert similar == pytest.approx([jaccard(texts[n], texts[n + 1]) for n in row]) and lengths.min() == 0


@pytest.mark.parametrize(("edit", "least"), [("added", 10), ("put in", 13), ("changed", 18), ("swapped", 30)])
def test_how_long_a_text_hides_one_edit(edit, least):
    for length in range(4, 40):
        one = [f"w{number}" for number in range(length)]
        other = one.copy()
        middle = length // 2
        if edit == "added":
            other.append("new")
        elif edit == "put in":
            other.insert(middle, "new")
        elif edit == "changed":
            other[middle] = "new"
        elif length > 12:  # so that no n-gram holds both, or an end
            other[3], other[-4] = other[-4], other[3]
        else:
            continue
        assert (jaccard(" ".join(one), " ".join(other)) >= 0.8 - 1e-9) == (length >= least), length


def test_colours_that_change_places_are_another_caption():
    assert jaccard("red circle left of blue square", "blue circle left of red square") < 0.6


def test_bands_are_shared_as_often_as_similarity_says():
    """P(some band is shared) = 1 - (1 - s^rows)^bands, for sets of known similarity."""
    assert (band_count(0.8), band_rows(0.8)) == (24, 8)
    rng = np.random.default_rng(0)
    for similarity, common in ((0.8, 16), (0.6, 12)):
        values = rng.integers(0, 2**64, (2000, 20), dtype=np.uint64)  # common, and half of the rest on either side
        rest = (20 - common) // 2
        bands = [
            text_bands(np.arange(2001) * (common + rest), side.ravel(), 0.8)
            for side in (np.delete(values, np.s_[common : common + rest], 1), values[:, : common + rest])
        ]
        share = np.mean((bands[0] == bands[1]).any(1))
        expected = 1 - (1 - similarity**8) ** 24
        assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 2000))


def test_rare_keys_never_part_what_is_near():
    texts = [text for text, _ in mixed(120, 6)]
    starts, values = shingle(texts)
    row, keys = rare_keys(starts, values, np.full(120, 5, np.uint64), 0.8)
    of = [set(keys[row == number].tolist()) for number in range(120)]
    pairs = list(itertools.combinations(range(120), 2))
    near = [pair for pair in pairs if jaccard(texts[pair[0]], texts[pair[1]]) >= 0.8]
    assert len(near) > 10 and all(of[one] & of[other] for one, other in near)
    assert sum(bool(of[one] & of[other]) for one, other in pairs) < len(pairs)
