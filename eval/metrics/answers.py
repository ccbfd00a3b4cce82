"""Scores of short answers, beside VQA accuracy: exact match, token F1, relaxed accuracy, ANLS. Knows strings alone.

Each takes one prediction and the answers that count as right, gives the best score over them in [0, 1], and raises
ValueError without answers. Their means over a set are what papers report.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

ANLS_THRESHOLD = 0.5
RELATIVE_TOLERANCE = 0.05
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 where an answer is the same after SQuAD's normalisation (Rajpurkar et al. 2016): case, punctuation, articles."""
    return _best(lambda answer: float(_squad(prediction) == _squad(answer)), answers)


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """SQuAD's F1 of the words shared, counted, after the same normalisation; 0 where either side has none."""
    return _best(lambda answer: _f1(_squad(prediction).split(), _squad(answer).split()), answers)


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """ChartQA's accuracy (Masry et al. 2022, § 5.1): a number may be 5 % off the answer, all else must be equal.

    A percentage counts as its hundredth and case does not matter; against an answer of 0 the texts are compared. So
    the program that came with Pix2Struct has it, and lmms-eval after it.
    """
    return _best(lambda answer: float(_is_near(prediction, answer)), answers)


def anls(prediction: str, answers: Sequence[str]) -> float:
    """ANLS of DocVQA (Biten et al. 2019, eq. 1): 1 - edit distance / longer length, and 0 where that is below 0.5.

    Case and repeated white space do not matter to the distance; lengths are those of the texts as they came, as in the
    challenge's own program.
    """
    score = _best(lambda answer: _similarity(prediction, answer), answers)
    return score if score >= ANLS_THRESHOLD else 0.0


def _best(score: Callable[[str], float], answers: Sequence[str]) -> float:
    if not answers:
        raise ValueError("no answers to compare with")
    return max(score(answer) for answer in answers)


def _squad(text: str) -> str:
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def _f1(said: list[str], right: list[str]) -> float:
    shared = (Counter(said) & Counter(right)).total()
    return 2 * shared / (len(said) + len(right)) if shared else 0.0


def _is_near(prediction: str, answer: str) -> bool:
    said, right = _number(prediction), _number(answer)
    if said is None or not right:
        return prediction.lower() == answer.lower()
    return abs(said - right) / abs(right) <= RELATIVE_TOLERANCE


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _similarity(a: str, b: str) -> float:
    longer = max(len(a.upper()), len(b.upper()))
    return 1 - _edit_distance(_plain(a), _plain(b)) / longer if longer else 1.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _edit_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]
