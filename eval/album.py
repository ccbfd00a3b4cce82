"""The pictures of an evaluation's items, read again from the data it was made on.

Knows splits of shards and benchmarks as they are downloaded, by what results.json and samples.jsonl say of them. Knows
nothing of scores, or of how a picture is shown.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from vlm.errors import UsageError
from vlm.shards import Shards

from .tasks import TASKS, Benchmark

MAIN = "main"  # what results.json calls the data of tasks without a split


class Album:
    """Finds the pictures of a line of samples.jsonl, opening each set of data when it is first wanted.

    results: what results.json holds. `missing` gathers a sentence for each set of data that is no longer as it was.
    """

    def __init__(self, results: Mapping[str, Any]) -> None:
        self._data: Mapping[str, Any] = results.get("data") or {}
        self._limit = results.get("limit")
        self._finders: dict[str, Callable[[Mapping[str, Any]], Sequence[Any]]] = {}
        self.missing: list[str] = []

    def of(self, line: Mapping[str, Any]) -> list[bytes | None]:
        """Each picture as a file's bytes, None for one that can not be read; empty for an item without pictures."""
        if "images" in line:
            return [_read(Path(str(path))) for path in line["images"]]
        name, _, split = str(line.get("task")).partition("@")
        task = TASKS.get(name)
        place = name if isinstance(task, Benchmark) else split or MAIN
        if place not in self._finders:
            self._finders[place] = self._finder(task, place)
        return [_read(source) for source in self._finders[place](line)]

    def _finder(self, task: Any, place: str) -> Callable[[Mapping[str, Any]], Sequence[Any]]:
        source = self._data.get(place)
        try:
            if source is not None and isinstance(task, Benchmark):
                examples = {one.id: one.images for one in task.examples(Path(source), self._limit)}
                return lambda line: examples.get(line["id"], ())
            if source is not None:
                shards = Shards.open(source)
                return partial(_in_shards, shards, {key: number for number, key in enumerate(shards.keys)})
        except UsageError as error:
            self.missing.append(f"The data of {place} is no longer as it was, so no pictures can be shown: {error}.")
        return lambda line: ()


def _in_shards(shards: Shards, numbers: Mapping[str, int], line: Mapping[str, Any]) -> Sequence[Any]:
    number = numbers.get(str(line.get("key")))
    return () if number is None else shards[number].images


def _read(source: Any) -> bytes | None:
    """A picture that is kept as a file, as a file's bytes, or as a function that gives either or an image."""
    held = source() if callable(source) else source
    if isinstance(held, Path):
        try:
            return held.read_bytes()
        except OSError:
            return None
    if isinstance(held, Image.Image):
        buffer = io.BytesIO()
        held.save(buffer, "PNG")
        return buffer.getvalue()
    return held
