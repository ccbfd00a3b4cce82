"""VQA accuracy as the official evaluation computes it. Knows strings and human answers; nothing of models or files.

Held to GT-Vision-Lab/VQA, `vqaEval.py` (Antol et al. 2015, https://visualqa.org/evaluation.html), quirks included:

* prediction and human answers are normalised only where the human answers differ; unanimous ones are taken as they are;
* a punctuation mark vanishes if it touches a space anywhere in the text, or if the text holds a digit,comma,digit;
  elsewhere it becomes a space;
* full stops before anything but a digit vanish, the first 32 only (a flag passed where `re.sub` takes a count);
* number words become digits, `none` too; articles go; contractions get their apostrophes back, `somebody'd` loses its;
* "the others" of a human answer are the entries unequal to it, so entries without an id of their own drop out together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
FULL_STOP = re.compile(r"\.(?!\d)")
FULL_STOPS_REMOVED = int(re.UNICODE)  # 32: the flag that stands in the place of the count
NUMBER_WORDS = "zero one two three four five six seven eight nine ten".split()
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBER_WORDS)}
ARTICLES = frozenset({"a", "an", "the"})
# A contraction is recognised with any one of its apostrophes missing. The official forms with a capital (Im, Ive) are
# left out: words are lower-cased before they are looked up.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't
    not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
    won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
CONTRACTIONS = {form[:i] + form[i + 1 :]: form for form in _CONTRACTIONS for i in range(len(form)) if form[i] == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"


def clean(text: str) -> str:
    """What every answer goes through: line breaks and tabs become spaces, the ends are stripped."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 16)
def normalize(text: str) -> str:
    """The official normalisation of an already `clean` answer: punctuation, number words, articles, contractions."""
    result = text
    has_grouped_digits = DIGIT_COMMA_DIGIT.search(text) is not None
    for mark in PUNCTUATION:
        if mark in text:
            vanishes = has_grouped_digits or f"{mark} " in text or f" {mark}" in text
            result = result.replace(mark, "" if vanishes else " ")
    result = FULL_STOP.sub("", result, count=FULL_STOPS_REMOVED)
    words = (NUMBERS.get(word, word) for word in result.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def exact_match(prediction: str, answer: str) -> float:
    """1.0 if both are the same after the official normalisation, else 0.0: the score where there is one answer only."""
    return float(normalize(clean(prediction)) == normalize(clean(answer)))


def question_accuracy(prediction: str, answers: Sequence[str] | Sequence[Mapping[str, Any]]) -> float:
    """Accuracy in [0, 1] of one prediction against the people's answers.

    `answers` are the annotation's entries (`{"answer": …, "answer_id": …, …}`), or plain strings, each its own entry.
    The mean, over the people, of min(1, how many of the others said the same / 3). Raises ValueError without answers.
    """
    if not answers:
        raise ValueError("no human answers to compare with")
    given: list[dict[str, Any]] = [
        dict(a) if isinstance(a, Mapping) else {"answer": a, "answer_id": i} for i, a in enumerate(answers)
    ]
    entries = [{**entry, "answer": clean(entry["answer"])} for entry in given]
    prediction = clean(prediction)
    if len({entry["answer"] for entry in entries}) > 1:
        entries = [{**entry, "answer": normalize(entry["answer"])} for entry in entries]
        prediction = normalize(prediction)
    shares = []
    for entry in entries:
        matching = sum(other["answer"] == prediction for other in entries if other != entry)
        shares.append(min(1.0, matching / 3))
    return sum(shares) / len(shares)


def vqa_accuracy(predictions: Mapping[int, str], annotations: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The official table: percentages rounded to two decimals, `overall`, `perQuestionType`, `perAnswerType`.

    `predictions`: question_id -> answer. `annotations`: the entries of the official file (`question_id`, `answers`,
    `question_type`, `answer_type`). Raises KeyError for a question without a prediction, ValueError for no annotations.
    """
    overall: list[float] = []
    per_question_type: dict[str, list[float]] = {}
    per_answer_type: dict[str, list[float]] = {}
    for annotation in annotations:
        accuracy = question_accuracy(predictions[annotation["question_id"]], annotation["answers"])
        overall.append(accuracy)
        per_question_type.setdefault(annotation["question_type"], []).append(accuracy)
        per_answer_type.setdefault(annotation["answer_type"], []).append(accuracy)
    if not overall:
        raise ValueError("no annotations to score against")
    return {
        "overall": _percentage(overall),
        "perQuestionType": {name: _percentage(scores) for name, scores in per_question_type.items()},
        "perAnswerType": {name: _percentage(scores) for name, scores in per_answer_type.items()},
    }


def _percentage(scores: Sequence[float]) -> float:
    return round(100 * sum(scores) / len(scores), 2)
