"""VQA accuracy against outputs of the official program, and its properties."""

from __future__ import annotations

import gzip
import json
import random
import string
from pathlib import Path

import pytest
from PIL import ImageFile

from vlm.eval.metrics.vqa import (
    CONTRACTIONS,
    agreement,
    evalai,
    exact_match,
    normalize,
    question_accuracy,
    vqa_accuracy,
)

GOLDENS = Path(__file__).parent / "goldens"
GOLDEN = json.loads((GOLDENS / "vqa.json").read_text("utf-8"))
MANY = json.loads(gzip.decompress((GOLDENS / "many.json.gz").read_bytes()))["vqa"]
SAID = {result["question_id"]: result["answer"] for result in GOLDEN["results"]}


def test_the_table_is_the_official_one() -> None:
    assert vqa_accuracy(SAID, GOLDEN["annotations"]) == GOLDEN["accuracy"]


def test_every_question_is_scored_as_officially() -> None:
    ours = [round(100 * question_accuracy(SAID[a["question_id"]], a["answers"]), 2) for a in GOLDEN["annotations"]]
    assert ours == GOLDEN["per_question"]
    assert len(set(ours)) > 5  # the goldens are not all right or all wrong


@pytest.mark.parametrize(("mode", "gold"), [("official", "per_question"), ("lmms", "lmms_per_question")])
def test_thousands_of_questions_are_scored_as_by_either_program(mode, gold) -> None:
    said = {result["question_id"]: result["answer"] for result in MANY["results"]}
    scores = [question_accuracy(said[a["question_id"]], a["answers"], mode) for a in MANY["annotations"]]
    assert [round(100 * score, 2) for score in scores] == MANY[gold]
    assert len(scores) == 4000
    if mode == "official":
        assert vqa_accuracy(said, MANY["annotations"]) == MANY["accuracy"]


def test_the_modes_differ_where_people_agree_and_between_digits() -> None:
    assert question_accuracy("Yes.", ["yes"] * 10, "official") == 0.0
    assert question_accuracy("Yes.", ["yes"] * 10, "lmms") == 1.0
    assert (normalize("1,,2", "official"), normalize("1,,2", "lmms")) == ("1 2", "12")


def test_ten_people_give_min_of_matches_over_three_averaged_over_the_other_nine() -> None:
    for matches in range(11):
        answers = ["red"] * matches + [f"other {i}" for i in range(10 - matches)]
        among_nine = (matches * min(1, (matches - 1) / 3) + (10 - matches) * min(1, matches / 3)) / 10
        assert question_accuracy("red", answers) == pytest.approx(max(0.0, among_nine))


def test_unanimous_answers_are_compared_without_normalisation() -> None:
    assert question_accuracy("Yes", ["yes"] * 10) == 0.0
    assert question_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1.0


def test_entries_without_ids_exclude_their_equals() -> None:
    assert question_accuracy("red", [{"answer": "red"}] * 10) == 0.0
    assert question_accuracy("red", [{"answer": "red", "answer_id": i} for i in range(10)]) == 1.0


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The dog, a cat", "dog cat"),
        ("none", "0"),
        ("two dogs", "2 dogs"),
        ("t-shirt", "t shirt"),
        ("t- shirt", "t shirt"),
        ("1,000-2", "10002"),
        ("on/off", "on off"),
        ("u.s.a.", "usa"),
        ("2.5", "2.5"),
        ("." * 40, "." * 8),
        ("dont", "don't"),
        ("yalld've", "yalld've"),
        ("y'alld've", "y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("what's this?", "what's this"),
        ("", ""),
    ],
)
def test_normalisation(text: str, normal: str) -> None:
    assert normalize(text) == normal


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("red, blue", "red blue"),
        ("1,000", "1000"),
        ("red,blue", "redblue"),
        ("What?is it?", "whatis it"),
        ("McDonald's", "mcdonald 's"),
        ("men's", "men 's"),
        ("It's the 's", "it 's 's"),
        ("the Nokia.", "nokia"),
        ("10:30", "10:30"),
        ("let's", "let 's"),
    ],
)
def test_normalisation_of_textvqa(text: str, normal: str) -> None:
    assert evalai(text) == normal


def odd_texts(count: int) -> list[str]:
    """Words, number words, contractions and marks in any order."""
    rng = random.Random(0)
    words = [*CONTRACTIONS, *CONTRACTIONS.values(), *"none Two a An THE 1 2,5 3. dog's İ ß".split()]
    marks = [*string.punctuation, *" \t\n\r", "", "", "'s", "\u2028", "’"]
    return ["".join(rng.choice(words) + rng.choice(marks) for _ in range(rng.randrange(6))) for _ in range(count)]


def test_textvqa_is_normalised_as_by_the_processor_that_lmms_eval_has_of_mmf(monkeypatch) -> None:
    # lmms-eval tells Pillow, for the whole process, to take truncated pictures for whole ones.
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", ImageFile.LOAD_TRUNCATED_IMAGES)
    metric = pytest.importorskip("lmms_eval.tasks._task_utils.vqa_eval_metric", reason="lmms-eval is not installed")
    theirs = metric.EvalAIAnswerProcessor()
    said = [answer["answer"] for annotation in MANY["annotations"] for answer in annotation["answers"]]
    texts = dict.fromkeys([*said, *(one["answer"] for one in MANY["results"]), *odd_texts(20_000)])
    assert len(texts) > 20_000
    assert {text: evalai(text) for text in texts} == {text: theirs(text) for text in texts}


def test_agreement_compares_texts_as_they_are() -> None:
    assert agreement("red", ["red"] * 4 + ["Red"] * 6) == 1.0
    assert agreement("Red", ["red"] * 10) == 0.0
    assert agreement("red", ["red", "red", "blue"]) == pytest.approx((1 / 3 + 1 / 3 + 2 / 3) / 3)
    with pytest.raises(ValueError, match="no human answers"):
        agreement("red", [])


def test_contractions_only_add_apostrophes() -> None:
    for short, form in CONTRACTIONS.items():
        assert short.replace("'", "") == form.replace("'", "")


def test_exact_match_normalises_both_sides() -> None:
    assert exact_match("The Two", "2") == 1.0
    assert exact_match("two", "three") == 0.0


def test_nothing_to_compare_with_is_an_error() -> None:
    with pytest.raises(ValueError, match="no human answers"):
        question_accuracy("red", [])
    with pytest.raises(ValueError, match="no annotations"):
        vqa_accuracy({}, [])
