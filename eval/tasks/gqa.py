"""GQA: compositional questions with one answer each.

Knows this layout, https://cs.stanford.edu/people/dorarad/gqa/download.html: testdev_balanced_questions.json and
images/ID.jpg; train_balanced_questions.json for examples. Accuracies are percentages, as the official eval.py prints
them: equal to the answer letter for letter, once the reply is in lower case and without a full stop at its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .base import Item, Scored
from .benchmark import Benchmark, Example, written
from .choosing import mean, mean_by
from .reading import files, read_json
from .vqa import SHORT


def _read(folder: Path, split: str) -> Iterator[Example]:
    (path,) = files(folder, f"{split}_balanced_questions.json")
    for identity, entry in read_json(path).items():
        picture = folder / "images" / f"{entry['imageId']}.jpg"
        kinds = entry.get("types", {})
        yield Example(
            identity, (picture,), entry["question"], (entry["answer"],), type=kinds.get("structural"), about=kinds
        )


def _lower(items: Sequence[Item], outputs: Sequence[str]) -> list[str]:
    return [said.strip().rstrip(".").lower() for said in outputs]


def _metric(items: Sequence[Item], answers: Sequence[str]) -> Scored:
    scores = [float(said == item.references[0]) for item, said in zip(items, answers, strict=True)]
    metrics: dict[str, Any] = {"accuracy": 100 * mean(scores)}
    for name in ("structural", "semantic"):
        if all(name in item.about for item in items):
            metrics[f"accuracy_by_{name}"] = _percentages([item.about[name] for item in items], scores)
    if all(item.type for item in items):
        # eval.py: what asks for something is open, whatever verifies, compares or chooses is binary.
        metrics |= _percentages(["open" if item.type == "query" else "binary" for item in items], scores)
    return Scored(metrics, answers, scores)


def _percentages(kinds: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
    return {kind: 100 * share for kind, share in mean_by(kinds, scores).items()}


BENCHMARKS = (
    Benchmark(
        name="gqa",
        headline="accuracy",
        read=partial(_read, split="testdev"),
        train=partial(_read, split="train"),
        ways=written(SHORT, 16, read=_lower),
        metric=_metric,
        submission=lambda item, answer: {"questionId": item.id, "prediction": answer},
    ),
)
