"""The tasks: what each asks of a model about a sample, and how it scores what comes back.

Knows samples, prompts and metrics. Knows nothing of files, of splits, or of why a picture may be another sample's.
A task says which items a sample gives (`items`), how a model is asked (`ask`, by one of three kinds: what it writes,
how likely it finds a text, how near it puts pictures and texts) and what the outputs are worth (`score`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar

import numpy as np

from vlm.api import user_turn
from vlm.samples import Question, Sample, conversations

from .metrics.attributes import NOUN, Vocabulary, attribute_metrics
from .metrics.caption import caption_metrics, cider
from .metrics.perplexity import perplexity
from .metrics.retrieval import RANKS, chance_of_hit, recall_both_ways, recall_ceiling
from .metrics.tokenizer import tokenize
from .metrics.vqa import exact_match, question_accuracy
from .pictures import Look, Pictures

Track = Callable[[Sequence[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Item:
    """One thing asked: of which sample (its number and key), in which words, and what is right."""

    id: int
    sample: int
    key: str
    prompt: str = ""
    references: tuple[str, ...] = ()
    type: str | None = None
    messages: tuple[dict[str, Any], ...] = ()
    things: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True)
class Scored:
    """Metrics of all items, and per item what the model said and what it is worth (None: no score of its own)."""

    metrics: dict[str, Any]
    predictions: list[Any]
    scores: list[float | None]
    official: list[dict[str, Any]] = field(default_factory=list)


class Task(ABC):
    """One benchmark. `headline` names the metric that stands for it; `needs` says what its data must hold."""

    name: ClassVar[str]
    headline: ClassVar[str]
    needs: ClassVar[str]

    @abstractmethod
    def items(self, samples: Sequence[Sample], caption_prompt: str) -> list[Item]:
        """What is asked of these samples, in their order; empty if they hold nothing for the task."""

    @abstractmethod
    def ask(self, model: Any, items: Sequence[Item], look: Look, batch: int, track: Track) -> Any:
        """The model's outputs for the items, as `score` takes them. `track` wraps the batches to show progress."""

    @abstractmethod
    def score(self, items: Sequence[Item], outputs: Any) -> Scored:
        """What the outputs are worth."""


# ------------------------------------------------------------------------------------------- three kinds of asking


class Writing(Task):
    """The model writes an answer to a prompt, greedily. Outputs: one text an item."""

    max_new_tokens: ClassVar[int]

    def ask(self, model: Any, items: Sequence[Item], look: Look, batch: int, track: Track) -> list[str]:
        asked = [(look.key(item.sample), item.prompt) for item in items]
        # Each (picture, prompt) once. Questions on one picture stay together, for it is encoded once a batch; else
        # prompts of similar length stand together, for the shorter are padded.
        distinct = list(dict.fromkeys(asked))
        if len({key for key, _ in distinct}) in (1, len(distinct)):
            distinct.sort(key=lambda pair: len(pair[1]))
        said: dict[tuple[Hashable, str], str] = {}
        for part in track(_parts(distinct, batch)):
            pictures = {key: look.load(key) for key, _ in part}
            turns = [user_turn(pictures[key], prompt) for key, prompt in part]
            texts = model.generate(turns, max_new_tokens=self.max_new_tokens, temperature=0.0, batch_size=batch)
            said |= dict(zip(part, texts, strict=True))
        return [said[pair] for pair in asked]


class Weighing(Task):
    """How likely the model finds what the assistant says. Outputs: (log p, tokens) an item."""

    def ask(self, model: Any, items: Sequence[Item], look: Look, batch: int, track: Track) -> list[tuple[float, int]]:
        weighed: list[tuple[float, int]] = []
        for part in track(_parts(list(items), batch)):
            shown = [_with_pictures(item.messages, look.load(look.key(item.sample))) for item in part]
            weighed += model.loglikelihood(shown, batch_size=batch)
        return weighed


class Matching(Task):
    """How near pictures and texts lie. Outputs: (items, texts) cosines with the texts of `texts`."""

    def texts(self, items: Sequence[Item]) -> list[str]:
        """What the pictures are held against: here each item's own text."""
        return [item.references[0] for item in items]

    def ask(self, model: Any, items: Sequence[Item], look: Look, batch: int, track: Track) -> np.ndarray:
        texts = self.texts(items)
        # Equal texts get one embedding, so that they tie exactly whatever batch they would have fallen into.
        distinct = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        words = np.asarray(model.embed_text(list(distinct), batch_size=batch))
        keys = [look.key(item.sample) for item in items]
        rows: dict[Hashable, np.ndarray] = {}
        for part in track(_parts(list(dict.fromkeys(keys)), batch)):
            vectors = np.asarray(model.embed_image([look.load(key)[0] for key in part], batch_size=batch))
            rows |= dict(zip(part, vectors, strict=True))
        seen = np.stack([rows[key] for key in keys])
        return seen @ words[[distinct[text] for text in texts]].T


# ------------------------------------------------------------------------------------------------------ the tasks


class VQA(Writing):
    """Questions about pictures. One answer: equal after the official normalisation; several: official accuracy."""

    name, headline, needs, max_new_tokens = "vqa", "accuracy", "questions about images", 16

    def items(self, samples: Sequence[Sample], caption_prompt: str) -> list[Item]:
        asked = [(n, s.key, q) for n, s in enumerate(samples) if s.images for q in s.questions]
        ids = _ids([question.id for _, _, question in asked])
        return [Item(i, n, key, q.text, q.answers, q.type) for i, (n, key, q) in zip(ids, asked, strict=True)]

    def score(self, items: Sequence[Item], outputs: list[str]) -> Scored:
        scores = [_answer_score(said, item.references) for item, said in zip(items, outputs, strict=True)]
        kinds: dict[str, list[float]] = {}
        for item, score in zip(items, scores, strict=True):
            kinds.setdefault(item.type or "untyped", []).append(score)
        usual = Counter(Question("", item.references).answer for item in items).most_common(1)[0][0]
        metrics = {
            "accuracy": _mean(scores),
            "majority": _mean([_answer_score(usual, item.references) for item in items]),
            "majority_answer": usual,
            "accuracy_by_type": {kind: _mean(kinds[kind]) for kind in sorted(kinds)},
            "n_by_type": {kind: len(kinds[kind]) for kind in sorted(kinds)},
        }
        official = [{"question_id": item.id, "answer": said} for item, said in zip(items, outputs, strict=True)]
        return Scored(metrics, outputs, list(scores), official)


class Captioning(Writing):
    """Descriptions of pictures: BLEU, ROUGE-L, CIDEr; where samples list their objects, the attributes named right."""

    name, headline, needs, max_new_tokens = "caption", "CIDEr", "images with captions", 64

    def items(self, samples: Sequence[Sample], caption_prompt: str) -> list[Item]:
        told = [(n, s, s.captions) for n, s in enumerate(samples) if s.images and s.captions]
        ids = _ids([sample.extra.get("image_id") for _, sample, _ in told])
        return [
            Item(i, n, sample.key, caption_prompt, captions, things=_things(sample))
            for i, (n, sample, captions) in zip(ids, told, strict=True)
        ]

    def score(self, items: Sequence[Item], outputs: list[str]) -> Scored:
        metrics = caption_metrics(dict(enumerate(outputs)), {n: item.references for n, item in enumerate(items)})
        official = [{"image_id": item.id, "caption": said} for item, said in zip(items, outputs, strict=True)]
        if all(item.things for item in items):
            vocabulary = Vocabulary(thing for item in items for thing in item.things)
            counts = [vocabulary.count(said, item.things) for item, said in zip(items, outputs, strict=True)]
            shares = [count.right / count.possible for count in counts]
            return Scored(attribute_metrics(counts) | metrics, outputs, list(shares), official)
        references = [[tokenize(reference) for reference in item.references] for item in items]
        each = cider([tokenize(said) for said in outputs], references)[1]
        return Scored(metrics, outputs, list(each), official)


class Retrieval(Matching):
    """Find the text of a picture and the picture of a text among the first 500 pairs."""

    name, headline, needs, pairs = "retrieval", "image_to_text_R@1", "images with captions", 500

    def items(self, samples: Sequence[Sample], caption_prompt: str) -> list[Item]:
        told = ((n, s) for n, s in enumerate(samples) if len(s.images) == 1 and s.captions)
        return [Item(i, n, s.key, "", s.captions[:1]) for i, (n, s) in enumerate(islice(told, self.pairs))]

    def score(self, items: Sequence[Item], outputs: np.ndarray) -> Scored:
        texts = self.texts(items)
        ceilings = {f"ceiling_R@{k}": recall_ceiling(texts, k) for k in RANKS}
        metrics = recall_both_ways(outputs) | ceilings
        nearest = [texts[place] for place in outputs.argmax(axis=1)]
        return Scored(metrics, nearest, chance_of_hit(outputs, np.arange(len(items)), 1).tolist())


class Classification(Matching):
    """Zero-shot: the nearest of all labels that occur, each read as "a photo of a LABEL"."""

    name, headline, needs = "classification", "accuracy", 'images with a "label" in their JSON'

    def items(self, samples: Sequence[Sample], caption_prompt: str) -> list[Item]:
        labelled = [(n, s) for n, s in enumerate(samples) if len(s.images) == 1 and s.extra.get("label") is not None]
        return [Item(i, n, s.key, "", (str(s.extra["label"]),)) for i, (n, s) in enumerate(labelled)]

    def texts(self, items: Sequence[Item]) -> list[str]:
        return [f"a photo of a {label}" for label in self._labels(items)]

    def score(self, items: Sequence[Item], outputs: np.ndarray) -> Scored:
        labels = self._labels(items)
        own = np.array([labels.index(item.references[0]) for item in items])
        top1, top5 = (chance_of_hit(outputs, own, k) for k in (1, 5))
        metrics = {"accuracy": float(top1.mean()), "top_5": float(top5.mean()), "labels": len(labels)}
        return Scored(metrics, [labels[place] for place in outputs.argmax(axis=1)], top1.tolist())

    def _labels(self, items: Sequence[Item]) -> list[str]:
        return sorted({item.references[0] for item in items})


class Perplexity(Weighing):
    """Perplexity per token of each sample's first text: caption, else answer, else conversation, else plain text."""

    name, headline, needs = "perplexity", "perplexity", "captions, answers, conversations or texts"

    def items(self, samples: Sequence[Sample], caption_prompt: str) -> list[Item]:
        items: list[Item] = []
        for number, sample in enumerate(samples):
            documents = [messages for messages, _ in conversations(sample, caption_prompt)]
            if sample.text:
                documents.append([{"role": "assistant", "content": [{"type": "text", "text": sample.text}]}])
            if documents:
                told = "".join(part.get("text", "") for part in documents[0][-1]["content"])
                items.append(Item(len(items), number, sample.key, "", (told,), messages=tuple(documents[0])))
        return items

    def score(self, items: Sequence[Item], outputs: list[tuple[float, int]]) -> Scored:
        tokens = sum(count for _, count in outputs)
        each = [perplexity([output]) for output in outputs]
        return Scored({"perplexity": perplexity(outputs), "tokens": tokens}, [None] * len(items), list(each))


_ALL: tuple[Task, ...] = (VQA(), Captioning(), Retrieval(), Classification(), Perplexity())
TASKS = {task.name: task for task in _ALL}


# --------------------------------------------------------------------------------------------------------- beneath


def _answer_score(said: str, answers: Sequence[str]) -> float:
    return exact_match(said, answers[0]) if len(answers) == 1 else question_accuracy(said, answers)


def _things(sample: Sample) -> tuple[dict[str, str], ...]:
    """The sample's objects with the attributes that are words; none where the JSON holds no list of things with a shape."""
    objects = sample.extra.get("objects")
    if not isinstance(objects, list) or not all(isinstance(thing, Mapping) for thing in objects):
        return ()
    things = tuple({name: word for name, word in thing.items() if isinstance(word, str)} for thing in objects)
    return things if all(NOUN in thing for thing in things) else ()


def _ids(given: Sequence[Any]) -> list[int]:
    """The ids of the data where every item has one of its own; else numbers from 0."""
    usable = all(isinstance(one, int) for one in given) and len(set(given)) == len(given)
    return list(given) if usable else list(range(len(given)))


def _with_pictures(messages: Iterable[dict[str, Any]], pictures: Pictures) -> list[dict[str, Any]]:
    """The conversation with its image places filled in order."""
    left: Iterator[Any] = iter(pictures)
    filled = []
    for message in messages:
        content = [part | {"image": next(left)} if part["type"] == "image" else part for part in message["content"]]
        filled.append(message | {"content": content})
    return filled


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores)


def _parts(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
