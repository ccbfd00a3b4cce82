"""COCO captions: a list of images and a list of annotations, each of which names its image by id.

Knows the layout of captions_*.json. Knows nothing of other annotations, such as boxes or outlines.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vlm.errors import UsageError

from .base import Record, Skipped, Source, image_paths, need_file
from .json_stream import json_items, json_text
from .tables import Tables

# What the file tells is kept as JSON: an id may be a number or a word, and a word need not be valid Unicode.
_SCHEMA = """
CREATE TABLE images (number INTEGER PRIMARY KEY, id UNIQUE, file);
CREATE TABLE captions (number INTEGER PRIMARY KEY, image, text);
"""


class CocoCaptions(Source):
    """A row is an image with all its captions, in the order of annotations; the key is the image's place in the file.

    An image that nobody describes, and an annotation of an image that is not there, is Skipped.
    """

    empty = "give captions_*.json, with images and annotations"

    def __init__(self, src: Path, images: Path | None) -> None:
        need_file(src)
        super().__init__(src, images)

    def rows(self, scratch: Path) -> Iterator[tuple[int, str, str, list[str]] | Skipped]:
        """Number, id, file name and captions of each image, the last three as JSON."""
        with Tables(scratch, _SCHEMA) as tables:
            self._load_images(tables)
            self._load_captions(tables)
            for number, id, file in tables.execute("SELECT number, id, file FROM images ORDER BY number"):
                captions = tables.execute("SELECT text FROM captions WHERE image = ? ORDER BY number", (id,)).fetchall()
                if captions:
                    yield number, id, file, [text for (text,) in captions]
                else:
                    yield Skipped(f"{self.src} image {id}: no caption; annotate it or leave it out")
            yield from tables.skipped()

    def count(self) -> int:
        """Images."""
        return sum(1 for _ in json_items(self.src, "images.item"))

    def records(self, row: tuple[int, str, str, list[str]]) -> Iterable[Record]:
        """The one sample of an image."""
        number, id, file, captions = row[0], json.loads(row[1]), json.loads(row[2]), list(map(json.loads, row[3]))
        place = f"{self.src} image {id}"
        fields = {"image": file, "image_id": id, "caption": captions[0], "captions": captions}
        return [Record(place, f"{number:08d}", fields, tuple(map(self.image, image_paths(place, fields))))]

    def _load_images(self, tables: Tables) -> None:
        count = 0
        for count, image in enumerate(json_items(self.src, "images.item"), start=1):
            place = f"{self.src} image {count}"
            if (
                not isinstance(image, dict)
                or not _is_id(image.get("id"))
                or not isinstance(image.get("file_name"), str)
            ):
                tables.skip(f'{place} of the list: no "id" or no "file_name"; give both')
                continue
            id, file = json_text(self.src, image["id"]), json_text(self.src, image["file_name"])
            if not tables.put("INSERT OR IGNORE INTO images VALUES (?, ?, ?)", (count, id, file)):
                tables.skip(f"{place} of the list: id {id} comes twice; give every image its own")
        if not count:
            raise UsageError(f'{self.src}: no "images"; {self.empty}')

    def _load_captions(self, tables: Tables) -> None:
        count = 0
        for count, annotation in enumerate(json_items(self.src, "annotations.item"), start=1):
            if count == 1 and isinstance(annotation, dict) and "caption" not in annotation:
                held = ", ".join(map(str, annotation))
                raise UsageError(f"{self.src}: annotations hold {held} and no caption; {self.empty}")
            reason = self._load_caption(tables, count, annotation)
            if reason:
                tables.skip(f"{self.src} annotation {count} of the list: {reason}")
        if not count:
            raise UsageError(f"{self.src}: pictures without annotations, as COCO has for its tests; {self.empty}")
        tables.execute("CREATE INDEX captions_of_image ON captions (image, number)")

    def _load_caption(self, tables: Tables, number: int, annotation: Any) -> str | None:
        """Why it can not be used."""
        if not isinstance(annotation, dict) or not _is_id(annotation.get("image_id")):
            return 'no "image_id"; give the id of an image'
        caption = annotation.get("caption")
        if not isinstance(caption, str) or not caption.strip():
            return "no caption; fill it in"
        image = json_text(self.src, annotation["image_id"])
        if not tables.execute("SELECT 1 FROM images WHERE id = ?", (image,)).fetchone():
            return f"no image has the id {image}; add it to the list of images"
        values = (number, image, json_text(self.src, caption.strip()))
        tables.execute("INSERT INTO captions VALUES (?, ?, ?)", values)
        return None


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)
