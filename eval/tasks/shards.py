"""The tasks on shards: questions, captions, retrieval, classification and perplexity of whatever the samples hold.

Knows samples and metrics. Knows nothing of files, of splits, or of why a picture may be another sample's. A task says
which items a sample gives (`items`), how a model is asked (`asking`) and what the outputs are worth (`score`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar

import numpy as np

from vlm.samples import Question, Sample, conversations

from ..metrics.attributes import NOUN, Vocabulary, attribute_metrics
from ..metrics.caption import caption_metrics, cider
from ..metrics.perplexity import perplexity
from ..metrics.retrieval import RANKS, chance_of_hit, recall_both_ways, recall_ceiling
from ..metrics.tokenizer import tokenize
from ..metrics.vqa import exact_match, question_accuracy
from .base import Item, Matching, Scored, Task, Weighing, Writing, reply_turn


class ShardTask(Task):
    """A task on the samples of shards. `needs` says what they must hold."""

    needs: ClassVar[str]

    @abstractmethod
    def items(self, samples: Sequence[Sample], caption_prompt: str) -> list[Item]:
        """What is asked of these samples, in their order; empty if they hold nothing for the task."""


class VQA(ShardTask):
    """Questions about pictures. One answer: equal after the official normalisation; several: official accuracy."""

    name, headline, needs, asking = "vqa", "accuracy", "questions about images", Writing(16)

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


class Captioning(ShardTask):
    """Descriptions of pictures: BLEU, ROUGE-L, CIDEr; where samples list their objects, the attributes named right."""

    name, headline, needs, asking = "caption", "CIDEr", "images with captions", Writing(64)

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


class Retrieval(ShardTask):
    """Find the text of a picture and the picture of a text among the first 500 pairs."""

    name, headline, needs, pairs = "retrieval", "image_to_text_R@1", "images with captions", 500
    asking = Matching(lambda items: [item.references for item in items])

    def items(self, samples: Sequence[Sample], caption_prompt: str) -> list[Item]:
        told = ((n, s) for n, s in enumerate(samples) if len(s.images) == 1 and s.captions)
        return [Item(i, n, s.key, "", s.captions[:1]) for i, (n, s) in enumerate(islice(told, self.pairs))]

    def score(self, items: Sequence[Item], outputs: np.ndarray) -> Scored:
        texts = [item.references[0] for item in items]
        ceilings = {f"ceiling_R@{k}": recall_ceiling(texts, k) for k in RANKS}
        metrics = recall_both_ways(outputs) | ceilings
        nearest = [texts[place] for place in outputs.argmax(axis=1)]
        return Scored(metrics, nearest, chance_of_hit(outputs, np.arange(len(items)), 1).tolist())


class Classification(ShardTask):
    """Zero-shot: the nearest of all labels that occur, each read as "a photo of a LABEL"."""

    name, headline, needs = "classification", "accuracy", 'images with a "label" in their JSON'
    asking = Matching(lambda items: [(f"a photo of a {label}",) for label in _labels(items)])

    def items(self, samples: Sequence[Sample], caption_prompt: str) -> list[Item]:
        labelled = [(n, s) for n, s in enumerate(samples) if len(s.images) == 1 and s.extra.get("label") is not None]
        return [Item(i, n, s.key, "", (str(s.extra["label"]),)) for i, (n, s) in enumerate(labelled)]

    def score(self, items: Sequence[Item], outputs: np.ndarray) -> Scored:
        labels = _labels(items)
        own = np.array([labels.index(item.references[0]) for item in items])
        top1, top5 = (chance_of_hit(outputs, own, k) for k in (1, 5))
        metrics = {"accuracy": float(top1.mean()), "top_5": float(top5.mean()), "labels": len(labels)}
        return Scored(metrics, [labels[place] for place in outputs.argmax(axis=1)], top1.tolist())


class Perplexity(ShardTask):
    """Perplexity per token of each sample's first text: caption, else answer, else conversation, else plain text."""

    name, headline, needs, asking = "perplexity", "perplexity", "captions, answers, conversations or texts", Weighing()
    less_is_better = True

    def items(self, samples: Sequence[Sample], caption_prompt: str) -> list[Item]:
        items: list[Item] = []
        for number, sample in enumerate(samples):
            documents = [messages for messages, _ in conversations(sample, caption_prompt)]
            if sample.text:
                documents.append([reply_turn(sample.text)])
            if documents:
                told = "".join(part.get("text", "") for part in documents[0][-1]["content"])
                items.append(Item(len(items), number, sample.key, "", (told,), messages=tuple(documents[0])))
        return items

    def score(self, items: Sequence[Item], outputs: list[tuple[float, int]]) -> Scored:
        tokens = sum(count for _, count in outputs)
        each = [perplexity([output]) for output in outputs]
        return Scored({"perplexity": perplexity(outputs), "tokens": tokens}, [None] * len(items), list(each))


SHARD_TASKS: tuple[ShardTask, ...] = (VQA(), Captioning(), Retrieval(), Classification(), Perplexity())


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


def _labels(items: Sequence[Item]) -> list[str]:
    return sorted({item.references[0] for item in items})


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores)
