"""What img2dataset leaves of a crawl: a tar, or a folder, for each shard, and files beside it that tell of the downloads.

Knows which parts make a pair and which pairs can be used. Nothing of a stranger's tar is extracted, followed, run or taken
for a path.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm.errors import UsageError
from vlm.samples import IMAGE_EXTENSIONS

from .base import Record, Skipped, Source, need_folder, need_text
from .img2dataset_shard import Group, ShardReader
from .img2dataset_told import Told

_LARGEST = 2**29  # bytes of one part; no picture within the limit of pixels has as many


class Img2Dataset(Source):
    """A row is a shard with its number, in the order of names. A key is that number and the key in the shard.

    The caption is the .txt, else the JSON's "caption", else that of the parquet file. What a cut tar has lost, and what a
    shard lacks of what the files beside it promise, is Skipped in so many samples; failed downloads are told, and are none.
    """

    empty = "give the output folder of img2dataset, with --output_format webdataset or files"
    whole_shards = True

    def __init__(self, src: Path, images: Path | None) -> None:
        need_folder(src)
        if images is not None:
            raise UsageError(f"--images: the pictures of this format lie in {src} itself; leave it out")
        super().__init__(src, None)

    def rows(self, scratch: Path) -> Iterator[tuple[int, str]]:
        """Number, from 0, and name of each shard."""
        names = self._shards()
        if not names:
            raise UsageError(f"{self.src}: no .tar and no folder of pictures 00000; {self.empty}")
        yield from enumerate(names)

    def count(self) -> int | None:
        """Downloads, where all shards have files beside them that tell."""
        told = [Told(self.src, name.removesuffix(".tar")).stated() for name in self._shards()]
        return sum(counts.successes for counts in told if counts) if all(told) else None

    def records(self, row: tuple[int, str]) -> Iterator[Record | Skipped]:
        """The pairs of a shard, each as soon as it is whole."""
        number, name = row
        path = self.src / name
        told = Told(self.src, name.removesuffix(".tar"))
        shard = ShardReader(path, IMAGE_EXTENSIONS)
        for group in shard.groups():
            try:
                yield _record(number, path, group, told)
            except UsageError as error:
                yield Skipped(str(error))
        yield from _losses(path, shard, told)

    def _shards(self) -> list[str]:
        try:
            with os.scandir(self.src) as entries:
                return sorted(entry.name for entry in entries if _is_shard(entry))
        except OSError as error:
            raise UsageError(f"{self.src}: can not be read ({error.strerror}); check its permissions") from None


def _is_shard(entry: os.DirEntry[str]) -> bool:
    return (entry.name.endswith(".tar") and entry.is_file()) or (entry.name.isdecimal() and entry.is_dir())


def _record(number: int, path: Path, group: Group, told: Told) -> Record:
    place = f"{path} {group.key}"
    _check(path, group)
    parts = {part.extension: part for part in group.parts}
    picture = next(part for part in group.parts if part.extension in IMAGE_EXTENSIONS)
    fields = _fields(place, parts["json"].read()) if "json" in parts else {}
    caption = parts["txt"].read() if "txt" in parts else b""
    _set_caption(place, fields, caption, told, group.key)
    need_text(place, fields)
    return Record(place, f"{number:05d}-{group.key}", {"key": group.key} | fields, (picture.read(),))


def _check(path: Path, group: Group) -> None:
    """Raise UsageError for a key that is not one, and for parts that are not those of one pair."""
    key = group.key
    if not key.isprintable() or key.startswith("/") or ".." in key.split("/") or not key.rpartition("/")[2]:
        raise UsageError(f"{path}: {key!r} is no name for a member; make the tar anew")
    if "." in key:
        raise UsageError(f"{path}: key {key!r} has dots, which merges samples; replace them")
    if group.seen:
        raise UsageError(f"{path}: key {key!r} comes twice; give every sample its own")
    name, count = Counter(part.extension for part in group.parts).most_common(1)[0]
    if count > 1:
        raise UsageError(f"{path}: {key}.{name} comes {count} times; give every sample its own key")
    pictures = [part.extension for part in group.parts if part.extension in IMAGE_EXTENSIONS]
    if len(pictures) != 1:
        held = ", ".join(part.extension for part in group.parts)
        raise UsageError(f"{path} {key}: {len(pictures)} pictures among its parts {held}; give it one")
    large = next((part for part in group.parts if part.size > _LARGEST), None)
    if large is not None:
        raise UsageError(f"{path} {key}: .{large.extension} has {large.size} bytes, the limit is {_LARGEST}; drop it")


def _fields(place: str, data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place}: .json can not be read ({error}); download it again") from None
    if not isinstance(fields, dict):
        raise UsageError(f"{place}: .json holds a {type(fields).__name__}; write one JSON object")
    return fields


def _set_caption(place: str, fields: dict[str, Any], text: bytes, told: Told, key: str) -> None:
    """The first of the places where a caption may stand that has one."""
    try:
        caption: Any = text.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UsageError(f"{place}: .txt is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    caption = caption or fields.get("caption")
    if not isinstance(caption, str) or not caption.strip():
        caption = told.caption(key)
    if caption:
        fields["caption"] = caption


def _losses(path: Path, shard: ShardReader, told: Told) -> Iterator[Skipped]:
    """What the shard does not hold, of what it ought to."""
    counts = told.counts()
    expected = counts.successes if counts else None
    missing = max(0, expected - shard.whole) if expected is not None else int(shard.damage is not None)
    if shard.damage is not None:
        lost = f"{missing} samples are lost" if expected is not None else "how many samples are lost is not known"
        yield Skipped(f"{shard.damage}, after {shard.last or 'no sample'}; {lost}; download it again", missing)
    elif missing:
        yield Skipped(f"{path}: {shard.whole} samples, {told.source} tells of {expected}; download it again", missing)
    if shard.passed_over:
        others = (
            f"{shard.passed_over} members that are no picture, .txt or .json, the first {shard.first_passed_over!r}"
        )
        yield Skipped(f"{path}: {others}", samples=0)
    if counts and counts.failed:
        why = "".join(f"; {reason}: {count}" for reason, count in counts.reasons)
        yield Skipped(f"{path}: {counts.failed} of {counts.total} addresses were not downloaded{why}", samples=0)
