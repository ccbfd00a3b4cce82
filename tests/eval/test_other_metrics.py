"""Retrieval, attributes and perplexity."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from vlm.eval.metrics.attributes import Vocabulary, attribute_metrics
from vlm.eval.metrics.perplexity import perplexity
from vlm.eval.metrics.retrieval import chance_of_hit, recall_both_ways, recall_ceiling

RED = {"size": "small", "colour": "red", "shape": "circle"}
BLUE = {"size": "large", "colour": "blue", "shape": "star"}
CROSS = {"size": "large", "colour": "green", "shape": "cross"}
VOCABULARY = Vocabulary([RED, BLUE, CROSS])


# ---------------------------------------------------------------------------------------------------- retrieval


def test_recall_is_open_clips_where_nothing_ties() -> None:
    """open_clip's `get_clip_metrics`: the place of the own column in a descending argsort."""
    similarity = np.random.default_rng(0).normal(size=(40, 40)) + 2 * np.eye(40)
    ours = recall_both_ways(similarity)
    for name, table in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        places = np.where(np.argsort(-table, axis=1) == np.arange(40)[:, None])[1]
        for k in (1, 5, 10):
            assert ours[f"{name}_R@{k}"] == pytest.approx(np.mean(places < k))


def test_ties_count_as_the_mean_over_their_orders() -> None:
    row = np.array([[0.5, 0.5, 0.9, 0.5, 0.1]])
    for k in range(1, 6):
        orders = [sorted(range(5), key=lambda i: (-row[0, i], order[i])) for order in itertools.permutations(range(5))]
        expected = np.mean([order.index(1) < k for order in orders])
        assert chance_of_hit(row, np.array([1]), k)[0] == pytest.approx(expected)


def test_not_a_number_is_no_hit() -> None:
    """Of a model that went NaN, everything ties; where one embedding did, it alone is never found first."""
    broken = np.full((4, 4), np.nan)
    assert chance_of_hit(broken, np.arange(4), 1).tolist() == [0.25] * 4
    partly = np.eye(4)
    partly[:, 2] = np.nan
    assert chance_of_hit(partly, np.arange(4), 1).tolist() == [1.0, 1.0, 0.0, 1.0]


def test_a_model_that_cannot_see_is_at_chance() -> None:
    recall = recall_both_ways(np.zeros((50, 50)))
    assert recall["image_to_text_R@1"] == recall["text_to_image_R@1"] == pytest.approx(1 / 50)


def test_no_model_passes_the_ceiling() -> None:
    rng = np.random.default_rng(1)
    texts = ["a"] * 3 + ["b"] * 12 + ["c", "d"]
    pictures, words = rng.normal(size=(17, 4)), {text: rng.normal(size=4) for text in "abcd"}
    oracle = np.array([[1.0 if mine == other else 0.0 for other in texts] for mine in texts])
    blind_to_pictures = pictures @ np.stack([words[text] for text in texts]).T
    for similarity in (oracle, blind_to_pictures):
        for name, value in recall_both_ways(similarity).items():
            assert value <= recall_ceiling(texts, int(name.partition("@")[2])) + 1e-12
    assert recall_ceiling(texts, 1) == pytest.approx(4 / 17)
    assert recall_ceiling(texts, 5) == pytest.approx((3 + 5 + 2) / 17)
    assert recall_both_ways(oracle)["image_to_text_R@1"] == pytest.approx(4 / 17)


def test_a_table_that_is_not_square_is_an_error() -> None:
    with pytest.raises(ValueError, match="square"):
        recall_both_ways(np.zeros((2, 3)))


# --------------------------------------------------------------------------------------------------- attributes


def share(caption: str, things: list[dict[str, str]]) -> float:
    return attribute_metrics([VOCABULARY.count(caption, things)])["attributes"]


@pytest.mark.parametrize(
    "caption",
    [
        "a small red circle left of a large blue star",
        "There is a large blue star and a small red circle.",
        "you see a large blue star at the top left, a small red circle",
    ],
)
def test_a_true_caption_is_right_in_any_order_and_wording(caption: str) -> None:
    assert share(caption, [RED, BLUE]) == share(caption, [BLUE, RED]) == 1.0


def test_plurals_and_numbers() -> None:
    assert share("two small red circles and three large green crosses", [RED] * 2 + [CROSS] * 3) == 1.0
    assert VOCABULARY.things_named("two small red circles") == [RED, RED]


def test_wrong_missing_and_invented_things_cost() -> None:
    assert share("a small blue circle left of a large blue star", [RED, BLUE]) == pytest.approx(5 / 6)
    assert share("a small red circle", [RED, BLUE]) == pytest.approx(3 / 6)
    assert share("a small red circle and a large blue star", [RED]) == pytest.approx(3 / 6)
    assert share("a red circle", [RED]) == pytest.approx(2 / 3)
    assert share("", [RED]) == 0.0


def test_precision_and_recall_take_their_own_denominators() -> None:
    metrics = attribute_metrics([VOCABULARY.count("a red circle", [RED, BLUE])])
    assert metrics == pytest.approx({"attributes": 2 / 6, "attributes_precision": 1.0, "attributes_recall": 2 / 6})


def test_the_pairing_is_the_best_of_all() -> None:
    rng = random.Random(0)
    words = {"size": ["small", "large"], "colour": ["red", "blue", "green"], "shape": ["circle", "star", "cross"]}
    draw = lambda: {name: rng.choice(values) for name, values in words.items()}  # noqa: E731
    for _ in range(60):
        true, named = [draw() for _ in range(rng.randint(1, 4))], [draw() for _ in range(rng.randint(1, 5))]
        caption = ", ".join("a " + " ".join(thing.values()) for thing in named)
        few, many = sorted((true, named), key=len)
        agree = [
            sum(a[name] == b[name] for a, b in zip(few, chosen, strict=True) for name in words)
            for chosen in itertools.permutations(many, len(few))
        ]
        assert VOCABULARY.count(caption, true).right == max(agree)


# --------------------------------------------------------------------------------------------------- perplexity


def test_perplexity_of_a_uniform_guess_is_the_number_of_choices() -> None:
    assert perplexity([(3 * math.log(1 / 7), 3), (5 * math.log(1 / 7), 5)]) == pytest.approx(7)


def test_perplexity_weighs_tokens_and_not_texts() -> None:
    assert perplexity([(-1.0, 1), (-0.0, 9)]) == pytest.approx(math.exp(0.1))
    assert perplexity([(-1e6, 1)]) == math.inf
    with pytest.raises(ValueError, match="no tokens"):
        perplexity([])
