"""VQA accuracy as the official evaluation computes it. Knows strings and human answers; nothing of models or files.

Mode `official` is held to GT-Vision-Lab/VQA, `vqaEval.py` at its last commit (Antol et al. 2015,
https://visualqa.org/evaluation.html; earlier ones clean human answers of punctuation alone, and score otherwise), quirks included:

* prediction and human answers are normalised only where the human answers differ; unanimous ones are taken as they are;
* a punctuation mark vanishes if it touches a space anywhere in the text, or if the text holds a digit,comma,digit;
  elsewhere it becomes a space;
* full stops before anything but a digit vanish, the first 32 only (a flag passed where `re.sub` takes a count);
* number words become digits, `none` too; articles go; contractions get their apostrophes back, `somebody'd` loses its;
* "the others" of a human answer are the entries unequal to it, so entries without an id of their own drop out together.

Mode `lmms` is held to lmms-eval 0.7 (`tasks/vqav2/utils.py`): prediction and human answers are always normalised, and
several commas between two digits count as one does; else it is the same.

`evalai` is held to MMF's `EvalAIAnswerProcessor`, which TextVQA is scored with (Singh et al. 2019) and lmms-eval has too: in
front of the same normalisation, commas and question marks vanish and a space comes before 's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, get_args

Mode = Literal["official", "lmms"]
MODES = get_args(Mode)

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
GROUPED_DIGITS = {"official": re.compile(r"\d,\d"), "lmms": re.compile(r"\d,+\d")}
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


@lru_cache(maxsize=1 << 18)
def normalize(text: str, mode: Mode = "official") -> str:
    """The normalisation of an already `clean` answer: punctuation, number words, articles, contractions."""
    result = text
    if not text.isalnum():
        has_grouped_digits = GROUPED_DIGITS[mode].search(text) is not None
        for mark in PUNCTUATION:
            if mark in text:
                vanishes = has_grouped_digits or f"{mark} " in text or f" {mark}" in text
                result = result.replace(mark, "" if vanishes else " ")
        result = FULL_STOP.sub("", result, count=FULL_STOPS_REMOVED)
    words = (NUMBERS.get(word, word) for word in result.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def evalai(text: str) -> str:
    """The normalisation of TextVQA, of an answer that need not be clean."""
    return normalize(clean(text.lower().replace(",", "").replace("?", "").replace("'s", " 's")))


def exact_match(prediction: str, answer: str) -> float:
    """1.0 if both are the same after the official normalisation, else 0.0: the score where there is one answer only."""
    return float(normalize(clean(prediction)) == normalize(clean(answer)))


def question_accuracy(
    prediction: str, answers: Sequence[str] | Sequence[Mapping[str, Any]], mode: Mode = "official"
) -> float:
    """Accuracy in [0, 1] of one prediction against the people's answers.

    `answers` are the annotation's entries (`{"answer": …, "answer_id": …, …}`), or plain strings, each its own entry.
    The mean, over the people, of min(1, how many of the others said the same / 3). Raises ValueError without answers.
    """
    given = [clean(a if isinstance(a, str) else a["answer"]) for a in answers]
    prediction = clean(prediction)
    if mode == "lmms" or len(set(given)) > 1:
        given = [normalize(answer, mode) for answer in given]
        prediction = normalize(prediction, mode)
    hits = [answer == prediction for answer in given]
    return _mean_share(sum(hits), _hits_that_are_no_others(answers, given, hits))


def agreement(prediction: str, answers: Sequence[str]) -> float:
    """`question_accuracy` of texts that are compared as they are, however they were normalised."""
    hits = [answer == prediction for answer in answers]
    return _mean_share(sum(hits), [int(hit) for hit in hits])


def _mean_share(hits: int, no_others: Sequence[int]) -> float:
    """hits: how many people said the same. no_others: for each of the people how many of those are not "the others"."""
    if not no_others:
        raise ValueError("no human answers to compare with")
    shares = [min(1.0, (hits - alike) / 3) for alike in no_others]
    return sum(shares) / len(shares)


def _hits_that_are_no_others(answers: Sequence[Any], given: list[str], hits: list[bool]) -> list[int]:
    """For each entry how many of the matching ones equal it, itself among them: those are not "the others"."""
    if not answers or isinstance(answers[0], str) or len({entry.get("answer_id") for entry in answers}) == len(answers):
        return [int(hit) for hit in hits]
    entries = [{**entry, "answer": answer} for entry, answer in zip(answers, given, strict=True)]
    return [sum(hit for hit, other in zip(hits, entries, strict=True) if other == entry) for entry in entries]


def vqa_accuracy(
    predictions: Mapping[int, str], annotations: Iterable[Mapping[str, Any]], mode: Mode = "official"
) -> dict[str, Any]:
    """The official table: percentages rounded to two decimals, `overall`, `perQuestionType`, `perAnswerType`.

    `predictions`: question_id -> answer. `annotations`: the entries of the official file (`question_id`, `answers`,
    `question_type`, `answer_type`). Raises KeyError for a question without a prediction, ValueError for no annotations.
    """
    overall: list[float] = []
    per_question_type: dict[str, list[float]] = {}
    per_answer_type: dict[str, list[float]] = {}
    for annotation in annotations:
        accuracy = question_accuracy(predictions[annotation["question_id"]], annotation["answers"], mode)
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
