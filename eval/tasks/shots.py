"""Examples shown before a question: which ones, at random or by how alike the pictures are.

Knows examples and a model's image embeddings. Knows nothing of prompts or of how the examples are shown.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm.errors import UsageError

from ..pictures import open_all
from .base import Matching, Rolling
from .benchmark import Benchmark, Example, examples_of


@dataclass(frozen=True)
class Shots:
    """count: how many come before each question. by: "random" or "similar". source: the folder they are read from; None
    for the benchmark's own training split. seed: of the random choice."""

    count: int = 0
    by: str = "random"
    source: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 0:
            raise UsageError(f"shots is {self.count}; it must be at least 0")
        if self.by not in CHOOSERS:
            raise UsageError(f"shots by {self.by!r} is unknown; choose of {', '.join(CHOOSERS)}")

    def of(
        self, benchmark: Benchmark, examples: Sequence[Example], data: Path, model: Any, batch: int
    ) -> dict[int | str, list[Example]]:
        """Example id -> what is shown before it, never one with a picture of its own. Raises UsageError for too few."""
        if not self.count:
            return {}
        pool = [one for one in self._pool(benchmark, data) if one.answers]
        chosen = CHOOSERS[self.by](pool, examples, self, model, batch)
        short = [one.id for one in examples if len(chosen[one.id]) < self.count]
        if short:
            raise UsageError(
                f"task {benchmark.name}: {self.count} shots are wanted, {len(pool)} examples are there, too few with other "
                f"pictures for {len(short)} of {len(examples)} questions; lower --shots or give another --shots-from"
            )
        return chosen

    def _pool(self, benchmark: Benchmark, data: Path) -> list[Example]:
        if isinstance(benchmark.asking, Matching | Rolling):
            raise UsageError(
                f"task {benchmark.name} asks no questions, so no shots can come before one; leave --shots out"
            )
        if self.source is not None:
            return examples_of(benchmark.read, self.source, benchmark.name)
        if benchmark.train is None:
            raise UsageError(
                f"task {benchmark.name} has no training split; give --shots-from with a folder of its layout"
            )
        return examples_of(benchmark.train, benchmark.folder(data), f"{benchmark.name}, training split")


def _at_random(
    pool: Sequence[Example], examples: Sequence[Example], shots: Shots, model: Any, batch: int
) -> dict[int | str, list[Example]]:
    """A draw of its own for every example, the same whatever others are asked."""
    chosen: dict[int | str, list[Example]] = {}
    for example in examples:
        draw = random.Random(f"{shots.seed}:{example.id}")
        # All of a large pool is shuffled only for the few whose first draws are their own pictures.
        for size in (min(len(pool), 4 * shots.count), len(pool)):
            order = (pool[place] for place in draw.sample(range(len(pool)), size))
            chosen[example.id] = [one for one in order if _others(one, example)][: shots.count]
            if len(chosen[example.id]) == shots.count:
                break
    return chosen


def _most_alike(
    pool: Sequence[Example], examples: Sequence[Example], shots: Shots, model: Any, batch: int
) -> dict[int | str, list[Example]]:
    """RICES (Yang et al. 2022; Flamingo, appendix A.2): nearest by the model's own embedding of the first picture, the most
    alike last, next to the question."""
    theirs, ours = (_embedded(group, model, batch) for group in (pool, examples))
    chosen: dict[int | str, list[Example]] = {}
    for example, vector in zip(examples, ours, strict=True):
        order = np.argsort(-(theirs @ vector), kind="stable")
        nearest: list[Example] = []
        for place in order:
            if len(nearest) == shots.count:
                break
            if _others(pool[place], example):
                nearest.append(pool[place])
        chosen[example.id] = nearest[::-1]
    return chosen


def _embedded(examples: Sequence[Example], model: Any, batch: int) -> np.ndarray:
    """The first picture of each as a unit vector (N, D); one that several share is embedded once."""
    bare = [example.id for example in examples if not example.images]
    if bare:
        raise UsageError(f"{len(bare)} of {len(examples)} examples have no picture to compare; choose shots at random")
    distinct = {example.images[0]: place for place, example in reversed(list(enumerate(examples)))}
    rows: dict[Any, np.ndarray] = {}
    pictures = list(distinct)
    for start in range(0, len(pictures), batch):
        part = pictures[start : start + batch]
        opened = open_all(part, f"an example from {examples[distinct[part[0]]].id} on")
        rows |= dict(zip(part, np.asarray(model.embed_image(list(opened), batch_size=batch)), strict=True))
    return np.stack([rows[example.images[0]] for example in examples])


def _others(one: Example, example: Example) -> bool:
    """Whether an example shows none of the pictures that are asked about, and is not the question itself."""
    same = one.id == example.id and one.question == example.question
    return not same and not set(one.images) & set(example.images)


CHOOSERS = {"random": _at_random, "similar": _most_alike}
