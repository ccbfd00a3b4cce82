"""Open questions with the answers of ten people: VQAv2, OK-VQA, TextVQA, VizWiz.

Knows these layouts:

* `vqav2`, https://visualqa.org/download.html: v2_OpenEnded_mscoco_val2014_questions.json,
  v2_mscoco_val2014_annotations.json, val2014/COCO_val2014_000000000042.jpg; train2014 alike. `vqav2-testdev`:
  v2_OpenEnded_mscoco_test-dev2015_questions.json, test2015/COCO_test2015_….jpg, whose answers are not public.
* `okvqa`, https://okvqa.allenai.org/download.html: OpenEnded_mscoco_val2014_questions.json,
  mscoco_val2014_annotations.json, val2014/; train2014 alike.
* `textvqa`, https://textvqa.org/dataset/: TextVQA_0.5.1_val.json, train_images/ID.jpg (the pictures of val are there
  too); TextVQA_0.5.1_train.json.
* `vizwiz`, https://vizwiz.org/tasks-and-datasets/vqa/: Annotations/val.json, or val.json, and val/VizWiz_val_….jpg; train
  alike.

VQAv2 and OK-VQA print the official table, percentages to two decimals. The accuracy of the others is in [0, 1]. TextVQA always
normalises prediction and answers, as MMF does (`evalai`). VizWiz normalises the prediction alone, as VQA does, and takes the
answers as they are published: so does `VQAEval` of its own API, but for the typographic apostrophes in its contractions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..metrics.vqa import agreement, clean, evalai, normalize, question_accuracy, vqa_accuracy
from .base import Item, Scored
from .benchmark import Benchmark, Example, written
from .choosing import mean, mean_by
from .reading import by_id, check_same, files, first_of, read_json, section

SHORT = "{question}\nAnswer the question using a single word or phrase."
UNANSWERABLE = "{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n" + SHORT[11:]


def _read_vqa(folder: Path, questions: str, annotations: str | None, split: str) -> Iterator[Example]:
    """The official pair of files; without annotations the questions alone."""
    names = files(folder, *filter(None, [questions, annotations]))
    asked = by_id(names[0], section(names[0], read_json(names[0]), "questions"), "question_id")
    told: dict[Any, Any] = {}
    if annotations:
        told = by_id(names[1], section(names[1], read_json(names[1]), "annotations"), "question_id")
        check_same(names[1], told, asked, f"question ids of {names[0].name}")
    for identity, question in asked.items():
        picture = folder / split / f"COCO_{split}_{question['image_id']:012d}.jpg"
        annotation = told.get(identity, {"answers": []})
        answers = _most_frequent_first([answer["answer"] for answer in annotation["answers"]])
        yield Example(identity, (picture,), question["question"], answers, about=annotation)


def _most_frequent_first(answers: Sequence[str]) -> tuple[str, ...]:
    """All answers, that which most people gave in front: it is what an example shown before a question says."""
    counts = Counter(answers)
    return tuple(sorted(answers, key=lambda answer: -counts[answer]))


def _official_table(items: Sequence[Item], answers: Sequence[str]) -> Scored:
    said = {item.about["question_id"]: answer for item, answer in zip(items, answers, strict=True)}
    scores = [question_accuracy(said[item.about["question_id"]], item.about["answers"]) for item in items]
    return Scored(vqa_accuracy(said, [item.about for item in items]), answers, scores)


def _submitted(item: Item, answer: str) -> dict[str, Any]:
    return {"question_id": item.id, "answer": answer}


def _read_textvqa(folder: Path, split: str) -> Iterator[Example]:
    (path,) = files(folder, f"TextVQA_0.5.1_{split}.json")
    for identity, entry in by_id(path, section(path, read_json(path), "data"), "question_id").items():
        picture = folder / "train_images" / f"{entry['image_id']}.jpg"
        yield Example(identity, (picture,), entry["question"], _most_frequent_first(entry.get("answers", [])))


def _read_vizwiz(folder: Path, split: str) -> Iterator[Example]:
    path = first_of(folder, f"Annotations/{split}.json", f"{split}.json")
    for place, entry in enumerate(read_json(path)):
        answers = _most_frequent_first([answer["answer"] for answer in entry["answers"]])
        picture = folder / split / entry["image"]
        yield Example(place, (picture,), entry["question"], answers, type=entry["answer_type"])


def _textvqa_metric(items: Sequence[Item], answers: Sequence[str]) -> Scored:
    pairs = zip(items, answers, strict=True)
    scores = [agreement(evalai(said), [evalai(one) for one in item.references]) for item, said in pairs]
    return Scored({"accuracy": mean(scores)}, answers, scores)


def _vizwiz_metric(items: Sequence[Item], answers: Sequence[str]) -> Scored:
    pairs = zip(items, answers, strict=True)
    scores = [agreement(normalize(clean(said)), item.references) for item, said in pairs]
    by_type = mean_by([item.type or "untyped" for item in items], scores)
    return Scored({"accuracy": mean(scores), "accuracy_by_type": by_type}, answers, scores)


def _vizwiz_submitted(item: Item, answer: str) -> dict[str, Any]:
    return {"image": item.key, "answer": answer}


VQAV2 = Benchmark(
    name="vqav2",
    headline="overall",
    read=partial(
        _read_vqa,
        questions="v2_OpenEnded_mscoco_val2014_questions.json",
        annotations="v2_mscoco_val2014_annotations.json",
        split="val2014",
    ),
    train=partial(
        _read_vqa,
        questions="v2_OpenEnded_mscoco_train2014_questions.json",
        annotations="v2_mscoco_train2014_annotations.json",
        split="train2014",
    ),
    ways=written(SHORT, 16),
    metric=_official_table,
    submission=_submitted,
)
VQAV2_TESTDEV = replace(
    VQAV2,
    name="vqav2-testdev",
    read=partial(
        _read_vqa,
        questions="v2_OpenEnded_mscoco_test-dev2015_questions.json",
        annotations=None,
        split="test2015",
    ),
)
OKVQA = replace(
    VQAV2,
    name="okvqa",
    read=partial(
        _read_vqa,
        questions="OpenEnded_mscoco_val2014_questions.json",
        annotations="mscoco_val2014_annotations.json",
        split="val2014",
    ),
    train=partial(
        _read_vqa,
        questions="OpenEnded_mscoco_train2014_questions.json",
        annotations="mscoco_train2014_annotations.json",
        split="train2014",
    ),
)
TEXTVQA = Benchmark(
    name="textvqa",
    headline="accuracy",
    read=partial(_read_textvqa, split="val"),
    train=partial(_read_textvqa, split="train"),
    ways=written(SHORT, 16),
    metric=_textvqa_metric,
    submission=_submitted,
)
VIZWIZ = replace(
    TEXTVQA,
    name="vizwiz",
    read=partial(_read_vizwiz, split="val"),
    train=partial(_read_vizwiz, split="train"),
    ways=written(UNANSWERABLE, 16),
    metric=_vizwiz_metric,
    submission=_vizwiz_submitted,
)
BENCHMARKS = (VQAV2, VQAV2_TESTDEV, OKVQA, TEXTVQA, VIZWIZ)
