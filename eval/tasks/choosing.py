"""Multiple choice: three ways to have an option picked, and the share picked right.

Knows letters, replies and likelihoods. Knows nothing of files or of any one benchmark.

`generate`: the model writes, and the letter is read off its reply (`letter_of`). `letters`: the letter that it finds
likeliest as a reply to the same prompt. `texts`: the option whose text it finds likeliest, per token, as a reply to the
question alone; the options are not listed. Likelihoods include the end of the turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from .base import Choosing, Item, Scored, Writing, letter
from .benchmark import Example, Way

PROMPT = "{context}{question}\n{options}\nAnswer with the option's letter from the given choices directly."
_WHOLE = re.compile(r"\(?([A-Z])\)?[.:,)]?")
_OPENING = re.compile(r"\(?([A-Z])[.:)]{1,2}\s")
_TOLD = re.compile(r"\b(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*\(?([A-Z])\b")
_ARTICLE = re.compile(r"A\s+\w")


def letter_of(reply: str, options: Sequence[str]) -> str:
    """The letter that a reply picks: which it is ("B", "(B)"), of the option it repeats, which it opens with ("B. a cat"),
    which it names ("the answer is B"), or of the only option whose text is in it; "" where it picks none.

    As in `can_infer` of MMBench's own evaluation (Liu et al. 2024), letters are capitals, and an A before another word may be
    an article: "the answer is A dog" names A only where not exactly one option's text is in it.
    """
    letters = [letter(place) for place in range(len(options))]
    reply = reply.strip()
    said, texts = _plain(reply), [_plain(option) for option in options]
    whole, told = _WHOLE.fullmatch(reply), _TOLD.search(reply)
    inside = [place for place, text in enumerate(texts) if re.search(rf"\b{re.escape(text)}\b", said)]
    only = letters[inside[0]] if len(inside) == 1 else ""
    if whole and whole[1] in letters:
        return whole[1]
    if said in texts:
        return letters[texts.index(said)]
    if only and told and _ARTICLE.match(reply, told.start(1)):
        told = None
    named = (found[1] for found in (_OPENING.match(reply), told) if found)
    return next((one for one in named if one in letters), only)


def _plain(text: str) -> str:
    return text.strip().rstrip(".").casefold()


def _written(items: Sequence[Item], outputs: Sequence[str]) -> list[str]:
    return [letter_of(said, item.options) for item, said in zip(items, outputs, strict=True)]


def _likeliest(items: Sequence[Item], outputs: Sequence[list[tuple[float, int]]]) -> list[str]:
    return [_best([told for told, _ in weighed]) for weighed in outputs]


def _likeliest_per_token(items: Sequence[Item], outputs: Sequence[list[tuple[float, int]]]) -> list[str]:
    return [_best([told / count for told, count in weighed]) for weighed in outputs]


def _best(weights: list[float]) -> str:
    return letter(weights.index(max(weights)))


def _text_of_answer(example: Example) -> str:
    return example.options[ord(example.answers[0]) - ord("A")]


WAYS = {
    "generate": Way(PROMPT, Writing(16), _written),
    "letters": Way(PROMPT, Choosing(letters=True), _likeliest),
    "texts": Way("{context}{question}", Choosing(letters=False), _likeliest_per_token, _text_of_answer),
}


def share_right(*names: str) -> Callable[[Sequence[Item], Sequence[str]], Scored]:
    """A metric: `accuracy` in [0, 1], `accuracy_by_NAME` for each of these names in `Item.about`, and what was `unread`."""

    def metric(items: Sequence[Item], answers: Sequence[str]) -> Scored:
        scores = [float(said == item.references[0]) for item, said in zip(items, answers, strict=True)]
        metrics: dict[str, Any] = {"accuracy": mean(scores)}
        for name in names:
            metrics[f"accuracy_by_{name}"] = mean_by([item.about[name] for item in items], scores)
        return Scored(metrics | {"unread": mean([float(said == "") for said in answers])}, answers, scores)

    return metric


def mean(scores: Sequence[float]) -> float:
    """The mean of at least one score."""
    return sum(scores) / len(scores)


def mean_by(kinds: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
    """The mean of the scores of each kind, by name."""
    groups: dict[str, list[float]] = {}
    for kind, score in zip(kinds, scores, strict=True):
        groups.setdefault(kind, []).append(score)
    return {kind: mean(groups[kind]) for kind in sorted(groups)}
