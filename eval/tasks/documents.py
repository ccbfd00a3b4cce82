"""Charts and documents: ChartQA, DocVQA.

Knows these layouts:

* `chartqa`, https://github.com/vis-nlp/ChartQA ("ChartQA Dataset"): test/test_human.json, test/test_augmented.json and
  test/png/NAME.png; train alike. Relaxed accuracy of the human and of the augmented questions, and the mean of both, in [0, 1].
* `docvqa`, https://rrc.cvc.uab.es/?ch=17: val_v1.0.json or val_v1.0_withQT.json and documents/NAME.png; train alike. ANLS in
  [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from ..metrics.answers import anls, relaxed_accuracy
from .base import Item, Scored
from .benchmark import Benchmark, Example, written
from .choosing import mean, mean_by
from .reading import by_id, files, first_of, read_json, section
from .vqa import SHORT

CHARTQA_PARTS = ("human", "augmented")


def _read_chartqa(folder: Path, split: str) -> Iterator[Example]:
    names = files(folder, *(f"{split}/{split}_{part}.json" for part in CHARTQA_PARTS))
    for part, path in zip(CHARTQA_PARTS, names, strict=True):
        for place, entry in enumerate(read_json(path)):
            picture = folder / split / "png" / entry["imgname"]
            yield Example(f"{part}-{place}", (picture,), entry["query"], (entry["label"],), type=part)


def _chartqa_metric(items: Sequence[Item], answers: Sequence[str]) -> Scored:
    scores = [relaxed_accuracy(said, item.references) for item, said in zip(items, answers, strict=True)]
    parts = mean_by([str(item.type) for item in items], scores)
    return Scored({"relaxed_accuracy": mean(list(parts.values()))} | parts, answers, scores)


def _read_docvqa(folder: Path, split: str) -> Iterator[Example]:
    path = first_of(folder, f"{split}_v1.0.json", f"{split}_v1.0_withQT.json")
    for identity, entry in by_id(path, section(path, read_json(path), "data"), "questionId").items():
        yield Example(identity, (folder / entry["image"],), entry["question"], tuple(entry["answers"]))


def _anls_metric(items: Sequence[Item], answers: Sequence[str]) -> Scored:
    scores = [anls(said, item.references) for item, said in zip(items, answers, strict=True)]
    return Scored({"anls": mean(scores)}, answers, scores)


BENCHMARKS = (
    Benchmark(
        name="chartqa",
        headline="relaxed_accuracy",
        read=partial(_read_chartqa, split="test"),
        train=partial(_read_chartqa, split="train"),
        ways=written(SHORT, 16),
        metric=_chartqa_metric,
    ),
    Benchmark(
        name="docvqa",
        headline="anls",
        read=partial(_read_docvqa, split="val"),
        train=partial(_read_docvqa, split="train"),
        ways=written(SHORT, 32),
        metric=_anls_metric,
        submission=lambda item, answer: {"questionId": item.id, "answer": answer},
    ),
)
