"""The built-in set: drawn scenes with captions and questions, as shards.

Knows splits, seeds, processes and what is stored of a picture. What a scene is, how it looks and what is said of it are
the business of `scene_world`, `scene_drawing` and `scene_language`.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from vlm.errors import UsageError
from vlm.files import room_for
from vlm.machine import usable_cores
from vlm.shards import ShardWriter, new_folder

from .scene_drawing import draw, encode
from .scene_language import caption, questions
from .scene_world import LEVELS, Level, Scene, Thing, compose

COMPOSITIONAL = "test-compositional"
CHUNK = 100  # pictures that a process makes at a time


def generate_scenes(
    out: str | Path,
    level: str | Level = "easy",
    train: int = 20000,
    val: int = 500,
    test: int = 500,
    seed: int = 0,
    processes: int | None = None,
) -> dict[str, int]:
    """Write OUT/train, OUT/val, OUT/test and OUT/test-compositional (as many as test) and return their sizes.

    The same arguments give the same bytes, whatever the number of processes (default: one per usable core). `out`
    appears whole or not at all. Raises UsageError for a level that does not exist, a split without pictures, or an
    `out` that does.
    """
    if isinstance(level, str) and level not in LEVELS:
        raise UsageError(f"level {level!r} does not exist; use one of {', '.join(LEVELS)}")
    config = LEVELS[level] if isinstance(level, str) else level
    splits = {"train": train, "val": val, "test": test, COMPOSITIONAL: test}
    for split, number in splits.items():
        if number < 1:
            raise UsageError(f"{split} is {number} pictures; use at least 1")
    with room_for(out), new_folder(out) as folder:
        for split, number in splits.items():
            with ShardWriter(folder / split) as writer:
                for key, parts in _samples(config, split, number, seed, processes):
                    writer.write(key, parts)
    return splits


def make_scene(level: Level, split: str, seed: int, index: int) -> tuple[Scene, dict[str, Any]]:
    """What one picture shows and what its JSON part says of it. Depends on the arguments alone."""
    rng = Random(f"{level.name} {seed} {split} {index}")
    compositional = split == COMPOSITIONAL
    scene = compose(level, rng, compositional)
    numbers = level.train_questions if split == "train" else dict.fromkeys(level.train_questions, 1)
    fields = {
        "caption": caption(level, scene, rng),
        "qa": questions(level, scene, numbers, rng, compositional),
        "objects": [_object(level, thing) for thing in scene.things],
    }
    return scene, fields


def make_sample(level: Level, split: str, seed: int, index: int) -> dict[str, bytes]:
    """The files of one picture, by extension."""
    scene, fields = make_scene(level, split, seed, index)
    picture = draw(level, scene, Random(f"{level.name} {seed} {split} {index} drawn"))
    extension = {"PNG": "png", "JPEG": "jpg"}[level.picture_format]
    return {extension: encode(level, picture), "json": json.dumps(fields).encode()}


def _object(level: Level, thing: Thing) -> dict[str, Any]:
    texture = {"texture": thing.texture} if len(level.textures) > 1 else {}
    named = {"size": thing.size, **texture, "colour": thing.colour, "shape": thing.shape}
    return {**named, "x": round(thing.x, 4), "y": round(thing.y, 4), "radius": round(thing.radius, 4)}


def _samples(
    level: Level, split: str, number: int, seed: int, processes: int | None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    chunks = [range(start, min(start + CHUNK, number)) for start in range(0, number, CHUNK)]
    work = partial(_make_chunk, level, split, seed)
    width = max(6, len(str(number - 1)))
    for chunk, made in zip(chunks, _mapped(work, chunks, processes or usable_cores()), strict=True):
        for index, parts in zip(chunk, made, strict=True):
            yield f"{index:0{width}d}", parts


def _mapped(work: Any, chunks: list[range], processes: int) -> Iterable[list[dict[str, bytes]]]:
    if processes == 1 or len(chunks) == 1:
        yield from map(work, chunks)
        return
    # Forked where that exists: a fresh interpreter would take longer to import the package than to draw the pictures.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    with multiprocessing.get_context(method).Pool(min(processes, len(chunks))) as pool:
        yield from pool.imap(work, chunks)


def _make_chunk(level: Level, split: str, seed: int, indices: range) -> list[dict[str, bytes]]:
    return [make_sample(level, split, seed, index) for index in indices]
