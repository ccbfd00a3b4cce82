"""What a task is: items, the ways in which a model is asked about them, and what its outputs are worth.

Knows conversations, pictures by the key of a look, and the surface of a loaded model. Knows nothing of files, of metrics,
or of why a picture may be another sample's.

A way of asking (`Asking`) turns items into requests, cut into parts, and gathers from the answers what the task's `score`
takes. So whoever runs a task may put the parts in any order, in several processes, or only those that nobody has answered
yet.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlm.api import user_turn

from ..pictures import Look, Pictures, open_all


@dataclass(frozen=True)
class Shot:
    """An example shown before a question: pictures, what was asked about them, and the right reply."""

    id: int | str
    prompt: str
    reply: str
    images: Sequence[Any] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class Item:
    """One thing asked: of which sample (its number and key), in which words, and what is right.

    options: what can be chosen. shots: examples shown first. images: the paths of its pictures, where they are files.
    about: fields that only the task's metric reads.
    """

    id: int | str
    sample: int
    key: str
    prompt: str = ""
    references: tuple[str, ...] = ()
    type: str | None = None
    messages: tuple[dict[str, Any], ...] = ()
    things: tuple[dict[str, str], ...] = ()
    options: tuple[str, ...] = ()
    shots: tuple[Shot, ...] = ()
    images: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """Metrics of all items, and per item what the model said and what it is worth (None: no score of its own)."""

    metrics: dict[str, Any]
    predictions: Sequence[Any]
    scores: Sequence[float | None]
    official: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Request:
    """One thing put to the model. Equal keys get one answer; the key's `repr` is the same in every process."""

    key: tuple[Hashable, ...]
    load: Any = field(default=None, compare=False, repr=False)


Answered = Mapping[Request, Any]


class Asking(ABC):
    """A way to put items to a model."""

    @abstractmethod
    def parts(self, items: Sequence[Item], look: Look, batch: int) -> list[list[Request]]:
        """Everything to be asked, each request once, in parts of at most `batch`."""

    @abstractmethod
    def answers(self, model: Any, parts: Sequence[Sequence[Request]], look: Look) -> Iterator[tuple[int, list[Any]]]:
        """The model's answers to each part, with its place among the parts, as they are there: texts, lists of numbers, or
        float32 vectors."""

    @abstractmethod
    def gather(self, items: Sequence[Item], look: Look, answered: Answered) -> Any:
        """The answers as the outputs that `Task.score` takes."""


class PartByPart(Asking):
    """A way to put items to a model whose parts are batches."""

    def answers(self, model: Any, parts: Sequence[Sequence[Request]], look: Look) -> Iterator[tuple[int, list[Any]]]:
        """The answers of `put`."""
        for place, part in enumerate(parts):
            yield place, self.put(model, part, look)

    @abstractmethod
    def put(self, model: Any, part: Sequence[Request], look: Look) -> list[Any]:
        """The model's answers to one part."""


class Task(ABC):
    """One benchmark. `headline` names the metric that stands for it; `asking` is how it is put to a model.

    less_is_better: of two scores the lower is the better one.
    """

    name: str
    headline: str
    asking: Asking
    less_is_better: bool = False

    @abstractmethod
    def score(self, items: Sequence[Item], outputs: Any) -> Scored:
        """What the outputs are worth."""


# ------------------------------------------------------------------------------------------------- ways of asking


@dataclass(frozen=True)
class Writing(Asking):
    """The model writes a reply to a prompt, greedily. Outputs: one text an item."""

    max_new_tokens: int

    def parts(self, items: Sequence[Item], look: Look, batch: int) -> list[list[Request]]:
        # Questions on one picture stay together, for it is encoded once a batch; else prompts of similar length stand
        # together, for the shorter are padded.
        distinct = list(dict.fromkeys(self._request(item, look) for item in items))
        if len({request.key[0] for request in distinct}) in (1, len(distinct)):
            distinct.sort(key=lambda request: len(request.load.prompt))
        return cut(distinct, batch)

    def answers(self, model: Any, parts: Sequence[Sequence[Request]], look: Look) -> Iterator[tuple[int, list[str]]]:
        """All parts go to the model together: a part that waits for its longest reply leaves no row idle."""
        places = [(number, place) for number, part in enumerate(parts) for place in range(len(part))]
        told: dict[int, dict[int, str]] = {}
        for asked, reply in model.generate_each(
            self.conversations(parts, look),
            batch_size=max(map(len, parts), default=1),
            max_new_tokens=self.max_new_tokens,
            temperature=0.0,
        ):
            number, place = places[asked]
            mine = told.setdefault(number, {})
            mine[place] = reply
            if len(mine) == len(parts[number]):
                del told[number]
                yield number, [mine[place] for place in range(len(mine))]

    def conversations(self, parts: Sequence[Sequence[Request]], look: Look) -> Iterator[list[dict[str, Any]]]:
        """What is said to the model, part after part; the pictures of a part are opened as it is reached."""
        for part in parts:
            yield from _conversations([(request.key[0], request.load) for request in part], look)

    def gather(self, items: Sequence[Item], look: Look, answered: Answered) -> list[str]:
        return [answered[self._request(item, look)] for item in items]

    def _request(self, item: Item, look: Look) -> Request:
        return Request((look.key(item.sample), item.prompt, item.shots), item)


@dataclass(frozen=True)
class Weighing(PartByPart):
    """How likely the model finds the assistant's turns of `Item.messages`. Outputs: (log p, tokens) an item."""

    def parts(self, items: Sequence[Item], look: Look, batch: int) -> list[list[Request]]:
        return cut([self._request(place, item, look) for place, item in enumerate(items)], batch)

    def put(self, model: Any, part: Sequence[Request], look: Look) -> list[list[float]]:
        shown = [with_pictures(request.load.messages, look.load(request.key[1])) for request in part]
        return [list(pair) for pair in model.loglikelihood(shown, batch_size=len(part))]

    def gather(self, items: Sequence[Item], look: Look, answered: Answered) -> list[tuple[float, int]]:
        return [_pair(answered[self._request(place, item, look)]) for place, item in enumerate(items)]

    def _request(self, place: int, item: Item, look: Look) -> Request:
        return Request((place, look.key(item.sample)), item)


@dataclass(frozen=True)
class Choosing(PartByPart):
    """How likely the model finds each option as the reply. Outputs: a list of (log p, tokens) an item, by option.

    letters: the reply is the option's letter, else its text. Both are closed by the end of the assistant's turn.
    """

    letters: bool

    def parts(self, items: Sequence[Item], look: Look, batch: int) -> list[list[Request]]:
        asked = (request for item in items for request in self._requests(item, look))
        return cut(list(dict.fromkeys(asked)), batch)

    def put(self, model: Any, part: Sequence[Request], look: Look) -> list[list[float]]:
        turns = _conversations([(request.key[0], request.load) for request in part], look)
        told = [turn + [reply_turn(str(request.key[3]))] for turn, request in zip(turns, part, strict=True)]
        return [list(pair) for pair in model.loglikelihood(told, batch_size=len(part))]

    def gather(self, items: Sequence[Item], look: Look, answered: Answered) -> list[list[tuple[float, int]]]:
        return [[_pair(answered[request]) for request in self._requests(item, look)] for item in items]

    def _requests(self, item: Item, look: Look) -> list[Request]:
        replies = [letter(place) for place in range(len(item.options))] if self.letters else item.options
        return [Request((look.key(item.sample), item.prompt, item.shots, reply), item) for reply in replies]


@dataclass(frozen=True)
class Rolling(PartByPart):
    """How likely the model finds plain text, read in windows of tokens. Outputs: (log p, tokens) an item."""

    window: int

    def parts(self, items: Sequence[Item], look: Look, batch: int) -> list[list[Request]]:
        return cut([Request((place,), item) for place, item in enumerate(items)], batch)

    def put(self, model: Any, part: Sequence[Request], look: Look) -> list[list[float]]:
        texts = [request.load.prompt for request in part]
        weighed = model.loglikelihood_rolling(texts, window=self.window, batch_size=len(part))
        return [list(pair) for pair in weighed]

    def gather(self, items: Sequence[Item], look: Look, answered: Answered) -> list[tuple[float, int]]:
        return [_pair(answered[Request((place,))]) for place in range(len(items))]


# Per column of the similarities, the texts whose mean stands for it.
Columns = Callable[[Sequence[Item]], list[tuple[str, ...]]]


@dataclass(frozen=True)
class Matching(PartByPart):
    """How near pictures and texts lie. Outputs: (items, columns) cosines.

    A column that is several texts is the mean of their unit vectors, brought to unit length (CLIP's prompt ensembles,
    Radford et al. 2021, section 3.1.4).
    """

    columns: Columns

    def parts(self, items: Sequence[Item], look: Look, batch: int) -> list[list[Request]]:
        # Equal texts get one embedding, so that they tie exactly whatever batch they would have fallen into.
        texts = dict.fromkeys(text for column in self.columns(items) for text in column)
        keys = dict.fromkeys(look.key(item.sample) for item in items)
        words = cut([Request(("text", text)) for text in texts], batch)
        return words + cut([Request(("image", key)) for key in keys], batch)

    def put(self, model: Any, part: Sequence[Request], look: Look) -> list[np.ndarray]:
        shown: list[Any] = [request.key[1] for request in part]
        if part[0].key[0] == "text":
            return list(np.asarray(model.embed_text(shown, batch_size=len(part))))
        return list(np.asarray(model.embed_image([look.load(key)[0] for key in shown], batch_size=len(part))))

    def gather(self, items: Sequence[Item], look: Look, answered: Answered) -> np.ndarray:
        # Each different pair is multiplied once: equal ones must tie exactly, and where in a product a row or a column
        # stands may decide its last bit.
        columns, column_of = _distinct(self.columns(items))
        keys, row_of = _distinct([look.key(item.sample) for item in items])
        words = [np.mean([answered[Request(("text", text))] for text in column], axis=0) for column in columns]
        units = np.stack([word / max(float(np.linalg.norm(word)), np.finfo(np.float32).tiny) for word in words])
        seen = np.stack([answered[Request(("image", key))] for key in keys])
        return (seen @ units.T)[np.ix_(row_of, column_of)]


# --------------------------------------------------------------------------------------------------------- beneath


def letter(place: int) -> str:
    """A, B, C … of an option's place."""
    return chr(ord("A") + place)


def reply_turn(text: str) -> dict[str, Any]:
    """What the assistant says, as a turn of a conversation."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def cut(requests: Sequence[Request], size: int) -> list[list[Request]]:
    """The requests in parts of `size`."""
    return [list(requests[start : start + size]) for start in range(0, len(requests), size)]


def _conversations(asked: Sequence[tuple[Hashable, Item]], look: Look) -> list[list[dict[str, Any]]]:
    """For each picture key and item its examples and its prompt as turns. What several show is opened once."""
    pictures = {key: look.load(key) for key in dict.fromkeys(key for key, _ in asked)}
    shots = dict.fromkeys(shot for _, item in asked for shot in item.shots)
    shown = {shot: open_all(shot.images, f"example {shot.id}") for shot in shots}
    turns = []
    for key, item in asked:
        before = [
            turn for shot in item.shots for turn in (*user_turn(shown[shot], shot.prompt), reply_turn(shot.reply))
        ]
        turns.append(before + user_turn(pictures[key], item.prompt))
    return turns


def _distinct(values: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """The different values, and for each value its place among them."""
    places = {value: place for place, value in enumerate(dict.fromkeys(values))}
    return list(places), [places[value] for value in values]


def with_pictures(messages: Iterable[dict[str, Any]], pictures: Pictures) -> list[dict[str, Any]]:
    """The conversation with its image places filled in order."""
    left: Iterator[Any] = iter(pictures)
    filled = []
    for message in messages:
        content = [part | {"image": next(left)} if part["type"] == "image" else part for part in message["content"]]
        filled.append(message | {"content": content})
    return filled


def _pair(answer: Sequence[float]) -> tuple[float, int]:
    return float(answer[0]), int(answer[1])
