"""Retrieval, attributes, perplexity, short answers and calibration."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from vlm.eval.metrics import retrieval
from vlm.eval.metrics.answers import anls, relaxed_accuracy, squad_exact_match, token_f1
from vlm.eval.metrics.attributes import Vocabulary, attribute_metrics
from vlm.eval.metrics.calibration import expected_calibration_error
from vlm.eval.metrics.perplexity import perplexities, perplexity
from vlm.eval.metrics.retrieval import chance_of_any_hit, chance_of_hit, recall_both_ways, recall_ceiling

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


def test_a_table_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="square"):
        recall_both_ways(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"2 texts; got shape \(2, 3\)"):
        recall_both_ways(np.zeros((2, 3)), image_of=[0, 1])
    for image_of in ([0, 0, 0], [0, 1, 2]):
        with pytest.raises(ValueError, match="of 2 images needs a text"):
            recall_both_ways(np.zeros((2, 3)), image_of=image_of)


def test_several_captions_a_picture_are_scored_as_karpathy_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best rank among an image's captions, and the rank of a caption's image, by sorting; in blocks or at once."""
    rng = np.random.default_rng(2)
    owner = rng.permutation(np.repeat(np.arange(30), 5))
    similarity = rng.normal(size=(30, 150)) + 1.5 * (owner[None] == np.arange(30)[:, None])
    ours = recall_both_ways(similarity, image_of=owner)
    of_image = [int(np.flatnonzero(owner[np.argsort(-similarity[i])] == i)[0]) for i in range(30)]
    of_text = [int(np.flatnonzero(np.argsort(-similarity[:, j]) == owner[j])[0]) for j in range(150)]
    for k in (1, 5, 10):
        assert ours[f"image_to_text_R@{k}"] == pytest.approx(np.mean(np.array(of_image) < k))
        assert ours[f"text_to_image_R@{k}"] == pytest.approx(np.mean(np.array(of_text) < k))
    monkeypatch.setattr(retrieval, "BLOCK", 200)
    assert recall_both_ways(similarity, image_of=owner) == ours


def test_one_caption_a_picture_is_a_case_of_several() -> None:
    similarity = np.random.default_rng(3).integers(0, 4, (12, 12)).astype(np.float32)
    assert recall_both_ways(similarity) == recall_both_ways(similarity, image_of=np.arange(12))
    for k in (1, 3):
        own = np.arange(12)
        assert chance_of_any_hit(similarity, own, k) == pytest.approx(chance_of_hit(similarity, own, k))


def test_tied_captions_count_as_the_mean_over_their_orders() -> None:
    row, owner = np.array([[0.5, 0.5, 0.9, 0.5, 0.5, 0.1]]), np.array([0, 1, 1, 0, 1, 0])
    for k in range(1, 7):
        orders = itertools.permutations(range(6))
        sorted_ = [sorted(range(6), key=lambda i: (-row[0, i], order[i])) for order in orders]
        expected = np.mean([any(owner[i] == 0 for i in order[:k]) for order in sorted_])
        assert chance_of_any_hit(row, owner, k)[0] == pytest.approx(expected)


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


def test_perplexity_per_word_and_byte_are_those_of_lm_evaluation_harness() -> None:
    texts, weighed = ["a red dog", "café  là"], [(-6.0, 4), (-3.0, 2)]
    ours = perplexities(weighed, texts)
    assert ours["perplexity"] == pytest.approx(math.exp(9 / 6))
    assert ours["word_perplexity"] == pytest.approx(math.exp(9 / 5))
    assert ours["byte_perplexity"] == pytest.approx(math.exp(9 / (9 + 10)))
    assert ours["bits_per_byte"] == pytest.approx(9 / 19 / math.log(2))
    with pytest.raises(ValueError, match="got 2 of 1 texts"):
        perplexities(weighed, texts[:1])
    with pytest.raises(ValueError, match="no tokens"):
        perplexities([], [])


# ------------------------------------------------------------------------------------------------------- short answers


@pytest.mark.parametrize(
    ("said", "right", "score"),
    [
        ("104", "100", 1.0),
        ("106", "100", 0.0),
        ("-0.96", "-1", 1.0),
        ("50%", "0.5", 1.0),
        ("50", "0.5", 0.0),
        ("Blue", "blue", 1.0),
        ("0.01", "0", 0.0),
        ("0", "0", 1.0),
        ("about 100", "100", 0.0),
        ("1,000", "1000", 0.0),
    ],
)
def test_relaxed_accuracy(said: str, right: str, score: float) -> None:
    assert relaxed_accuracy(said, [right]) == score


def test_anls_is_one_minus_the_edit_distance_from_a_half_on() -> None:
    assert anls("The  Report", ["the report"]) == pytest.approx(1.0)
    assert anls("reprot", ["report"]) == pytest.approx(1 - 2 / 6)
    assert anls("ab", ["abcd"]) == 0.5
    assert anls("ab", ["abcde"]) == 0.0
    assert anls("cat", ["dog", "cart"]) == pytest.approx(0.75)
    assert anls("", [""]) == 1.0


def test_f1_and_exact_match_are_squads() -> None:
    assert squad_exact_match("The  cat!", ["a dog", "cat"]) == 1.0
    assert squad_exact_match("cats", ["cat"]) == 0.0
    assert token_f1("the big red dog", ["a red dog"]) == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    assert token_f1("dog dog", ["dog"]) == pytest.approx(2 / 3)
    assert token_f1("", ["the"]) == 0.0


@pytest.mark.parametrize("metric", [squad_exact_match, token_f1, relaxed_accuracy, anls])
def test_no_answers_are_an_error(metric) -> None:
    with pytest.raises(ValueError, match="no answers"):
        metric("x", [])


# --------------------------------------------------------------------------------------------------------- calibration


def test_calibration_error_is_its_formula_by_hand() -> None:
    # Two bins: (0.2, 0.5) with 1 of 2 right, (0.9, 1.0) with 1 of 2 right.
    assert expected_calibration_error([0.2, 0.5, 0.9, 1.0], [0, 1, 1, 0], bins=2) == pytest.approx(
        0.5 * abs(0.5 - 0.35) + 0.5 * abs(0.5 - 0.95)
    )
    assert expected_calibration_error([1.0, 0.0], [1, 0]) == 0.0


def test_calibration_of_what_is_sampled_from_itself_is_near_zero() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.random(200_000)
    assert expected_calibration_error(confidence, rng.random(200_000) < confidence) < 0.01


def test_calibration_of_what_does_not_fit_is_an_error() -> None:
    for confidence, right, said in (
        ([], [], "shapes"),
        ([0.5], [1, 0], "shapes"),
        ([1.5], [1], "1.5"),
        ([np.nan], [1], "nan"),
    ):
        with pytest.raises(ValueError, match=said):
            expected_calibration_error(confidence, right)
