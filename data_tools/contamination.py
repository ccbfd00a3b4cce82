"""Which samples of an evaluation set are in the training shards, or too close to something there.

Knows what too close means: the same picture by its perceptual hash; without pictures, the same text by MinHash. Knows
nothing of benchmarks; they come as held-out samples, whatever they were read from.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from vlm.errors import UsageError
from vlm.images import ImageSource, open_image
from vlm.samples import parse_sample, said
from vlm.shards import ShardFile, Shards, scan

from . import dedup
from .dedup_image import image_hash
from .engines import LocalEngine
from .job import Engine

PIECE = 1000  # held-out samples that are signed together
# By pairs, what has no pictures is compared by its text.
LIKENESS = (dedup.Rules("image"), dedup.Rules("pair"))


@dataclass(frozen=True)
class HeldOut:
    """One evaluation sample: what a person finds it by, its text, and its pictures, or functions that give them."""

    key: str
    text: str | None
    images: Sequence[ImageSource | Callable[[], ImageSource]]


@dataclass(frozen=True)
class Found:
    """An evaluation sample that training has seen, and the first training sample that is too close to it."""

    key: str
    like: str


def contamination(train: str | Path, held_out: Iterable[HeldOut], engine: Engine | None = None) -> list[Found]:
    """The samples of an evaluation set that are in the shards `train`, in their order.

    Training samples whose pictures can not be opened are passed over: training could not see them either. Raises
    UsageError for shards that are no shards, and for a held-out picture that can not be opened.
    """
    files = Shards.open(train).files
    with tempfile.TemporaryDirectory(prefix="vlm-contamination-") as folder:
        for _ in (engine or LocalEngine()).map(partial(_sign_shard, folder), enumerate(files)):
            pass
        pieces = [f"train-{number:05d}" for number in range(len(files))]
        keys = list(_sign_held_out(folder, held_out))
        held = [f"held-{number:05d}" for number in range(len(keys))]
        seen: dict[tuple[int, int], Found] = {}
        for rules in LIKENESS:
            place = _marks(folder, rules)
            dedup.find_duplicates(place, [*pieces, *held], rules, protected=len(pieces))
            for number, piece in enumerate(held):
                drops = dedup.dropped(place, piece)
                for index, shard, like in zip(drops.index, drops.kept_piece, drops.kept_index, strict=True):
                    if shard < len(files):
                        entry = Shards([files[int(shard)]]).entry(int(like))
                        seen.setdefault((number, int(index)), Found(keys[number][int(index)], entry.key))
    return [seen[place] for place in sorted(seen)]


def _marks(folder: str, rules: dedup.Rules) -> str:
    return f"{folder}/{rules.by}"


def _sign(folder: str, piece: str, texts: Sequence[str | None], hashes: Sequence[Sequence[int]]) -> None:
    for rules in LIKENESS:
        dedup.sign(texts, hashes, rules).save(_marks(folder, rules), piece)


def _sign_shard(folder: str, numbered: tuple[int, ShardFile]) -> None:
    number, file = numbered
    texts: list[str | None] = []
    hashes: list[list[int]] = []
    for entry in scan(file.local()):
        try:
            sample = parse_sample(entry.key, entry.read())
            shown = [image_hash(open_image(image)) for image in sample.images]
        except UsageError:
            texts.append(None)
            hashes.append([])
            continue
        texts.append("\n".join(said(sample)) or None)
        hashes.append(shown)
    _sign(folder, f"train-{number:05d}", texts, hashes)


def _sign_held_out(folder: str, held_out: Iterable[HeldOut]) -> Iterable[list[str]]:
    """Sign the evaluation set piece by piece; the keys of each."""
    samples, number = iter(held_out), 0
    while part := list(islice(samples, PIECE)):
        hashes = [[image_hash(_opened(sample, image)) for image in sample.images] for sample in part]
        _sign(folder, f"held-{number:05d}", [sample.text for sample in part], hashes)
        yield [sample.key for sample in part]
        number += 1


def _opened(sample: HeldOut, image: Any) -> Any:
    return open_image(image() if callable(image) else image, name=f"a picture of sample {sample.key}")
