"""Other people's files into shards.

Knows source formats: what a line says and where its images lie. Knows nothing of training. Images are copied byte for
byte, once they are found to open.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.errors import UsageError
from vlm.files import room_for
from vlm.images import open_image
from vlm.samples import SampleError, parse_sample
from vlm.shards import ShardWriter

EXTENSIONS = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp"}


@dataclass(frozen=True)
class Record:
    """One sample of a source: where it stands there, its fields as `interface.md` names them, its image files."""

    place: str
    key: str
    fields: dict[str, Any]
    images: tuple[Path, ...]


def convert(src: str | Path, out: str | Path, format: str = "jsonl", images: str | Path | None = None) -> int:
    """Write the samples of `src` as shards into the new folder `out` and return how many there are.

    `images` is the folder that image paths start from; the source's own by default. Raises UsageError naming the place
    in the source and the mend for the first thing that is wrong, and leaves nothing then.
    """
    if format not in READERS:
        raise UsageError(f"format {format!r} is not known; use one of {', '.join(READERS)}")
    source = Path(src)
    if not source.is_file():
        raise UsageError(f"{source}: no such file; check the path")
    root = Path(images) if images is not None else source.parent
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder; give the one that image paths start from")
    number = 0
    with room_for(out), ShardWriter(out) as writer:
        for record in READERS[format](source, root):
            writer.write(record.key, _parts(record))
            number += 1
        if not number:
            raise UsageError(f"{source}: no samples; give one JSON object a line")
    return number


def read_jsonl(source: Path, root: Path) -> Iterator[Record]:
    """One JSON object a line; its images under "image" (one path) or "images" (a list). Blank lines are passed over."""
    for number, line in _lines(source):
        place = f"{source} line {number}"
        try:
            fields = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{place}: not JSON ({error}); write one object a line, in UTF-8") from None
        if not isinstance(fields, dict):
            raise UsageError(f"{place}: a {type(fields).__name__}; write one object a line")
        paths = tuple(root / path for path in _image_paths(place, fields))
        yield Record(place, f"{number:08d}", fields, paths)


READERS: dict[str, Callable[[Path, Path], Iterator[Record]]] = {"jsonl": read_jsonl}


def _lines(source: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with open(source, "rb") as file:
            yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())
    except OSError as error:
        raise UsageError(f"{source}: can not be read ({error.strerror}); check its permissions") from None


def _image_paths(place: str, fields: dict[str, Any]) -> list[str]:
    if "image" in fields and "images" in fields:
        raise UsageError(f'{place}: both "image" and "images"; keep one')
    paths = [fields["image"]] if fields.get("image") is not None else fields.get("images") or []
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise UsageError(f'{place}: image paths are not strings; write "image": "a.png" or "images": ["a.png", …]')
    return paths


def _parts(record: Record) -> dict[str, bytes]:
    """The sample's files. Several images are numbered in their order."""
    parts = {}
    for number, path in enumerate(record.images):
        data = _image_bytes(record.place, path)
        extension = next(name for magic, name in EXTENSIONS.items() if data.startswith(magic))
        parts[extension if len(record.images) == 1 else f"{number}.{extension}"] = data
    parts["json"] = json.dumps(record.fields, ensure_ascii=False).encode("utf-8", "surrogatepass")
    try:
        parse_sample(record.key, parts)
    except SampleError as error:
        raise UsageError(f"{record.place}: {error}") from None
    return parts


def _image_bytes(place: str, path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{place}: image {path}: {reason}; check the path or give --images") from None
    try:
        open_image(data, name=f"image {path}")
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from None
    return data
