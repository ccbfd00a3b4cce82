"""The built-in set: drawn scenes with captions and questions, as shards.

Knows splits, seeds, processes and what is stored of a picture. What a scene is, how it looks and what is said of it are
the business of `scene_world`, `scene_drawing` and `scene_language`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from vlm.errors import UsageError
from vlm.shards import write_index
from vlm.storage import Folder, join

from .engines import LocalEngine
from .job import Engine, PieceWriter, job
from .scene_drawing import draw, encode
from .scene_language import caption, questions
from .scene_world import LEVELS, Level, Scene, Thing, compose

COMPOSITIONAL = "test-compositional"
SAMPLES_PER_SHARD = 1000


def generate_scenes(
    out: str | Path,
    level: str | Level = "easy",
    train: int = 20000,
    val: int = 500,
    test: int = 500,
    seed: int = 0,
    engine: Engine | None = None,
) -> dict[str, int]:
    """Write OUT/train, OUT/val, OUT/test and OUT/test-compositional (as many as test) and return their sizes.

    The same arguments give the same bytes, whatever the engine (default: a process per usable core). `out` appears
    whole or not at all. Raises UsageError for a level that does not exist, a split without pictures, or an
    `out` that does.
    """
    if isinstance(level, str) and level not in LEVELS:
        raise UsageError(f"level {level!r} does not exist; use one of {', '.join(LEVELS)}")
    config = LEVELS[level] if isinstance(level, str) else level
    splits = {"train": train, "val": val, "test": test, COMPOSITIONAL: test}
    for split, number in splits.items():
        if number < 1:
            raise UsageError(f"{split} is {number} pictures; use at least 1")
    settings = {"scenes": splits, "level": repr(config), "seed": seed}
    with job(out, settings, engine or LocalEngine()) as work:
        done = list(work.run("draw", partial(_draw_piece, config, seed), _pieces(splits), sum(splits.values())))
        for split in splits:
            shards = [shard for piece in done if piece["split"] == split for shard in piece["shards"]]
            write_index(join(work.folder.place, split), shards)
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


def _draw_piece(level: Level, seed: int, folder: Folder, number: int, piece: tuple[str, range, int]) -> dict[str, Any]:
    """One shard of a split: the pictures of these numbers, their keys `width` digits wide."""
    split, indices, width = piece
    with PieceWriter(Folder(join(folder.place, split)), indices.start // SAMPLES_PER_SHARD) as writer:
        for index in indices:
            writer.write(f"{index:0{width}d}", make_sample(level, split, seed, index))
    return {"split": split, "samples": len(indices), "shards": writer.shards}


def _pieces(splits: dict[str, int]) -> Iterator[tuple[str, range, int]]:
    for split, number in splits.items():
        width = max(6, len(str(number - 1)))
        for start in range(0, number, SAMPLES_PER_SHARD):
            yield split, range(start, min(start + SAMPLES_PER_SHARD, number)), width
