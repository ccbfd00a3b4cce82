"""A folder of pictures for each class, named after it. Knows folders and captions by template, and nothing of models."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from vlm.errors import UsageError
from vlm.samples import IMAGE_EXTENSIONS

from .base import Record, Skipped, Source, need_folder
from .tables import Tables

# Pictures that can not be read here are a loss, and named as one; files of other names were never pictures.
_PICTURES = tuple(f".{name}" for name in (*IMAGE_EXTENSIONS, "avif", "bmp", "gif", "heic", "jfif", "tif", "tiff"))
# Names as the bytes they are on disk: they need not be valid UTF-8.
_SCHEMA = "CREATE TABLE files (class BLOB, name BLOB, PRIMARY KEY (class, name)) WITHOUT ROWID;"


class ClassFolders(Source):
    """A row is a picture with its number, in the order of class and name, which is also the key.

    template: the caption, with {} for the class; underscores of its name are spaces there and in the label. Folders within
    a class and files that are not pictures are passed over; the last row tells how many.
    """

    empty = "put the pictures of each class into a folder named after it"
    options = ("template",)

    def __init__(self, src: Path, images: Path | None, template: str = "a photo of a {}") -> None:
        need_folder(src)
        if images is not None:
            raise UsageError(f"--images: the pictures of this format lie in {src} itself; leave it out")
        super().__init__(src, None)
        if template.count("{}") != 1:
            raise UsageError(
                f"--template: {template!r} has {template.count('{}')} places for the class; give it one {{}}"
            )
        self.template = template

    def rows(self, scratch: Path) -> Iterator[tuple[int, bytes, bytes] | Skipped]:
        """Number, from 1, class and name of each picture."""
        with Tables(scratch, _SCHEMA) as tables:
            passed_over = self._list(tables)
            listed = tables.execute("SELECT class, name FROM files ORDER BY class, name")
            number = 0
            for number, (kind, name) in enumerate(listed, start=1):
                yield number, kind, name
            if not number:
                raise UsageError(f"{self.src}: no pictures in folders of it; {self.empty}")
            if passed_over:
                yield Skipped(
                    f"{self.src}: {passed_over} files and folders that are not pictures of a class", samples=0
                )

    def count(self) -> int:
        """Pictures."""
        return sum(1 for name in self._files() if name is not None)

    def records(self, row: tuple[int, bytes, bytes]) -> Iterable[Record]:
        """The one sample of a picture."""
        number, kind, name = row[0], os.fsdecode(row[1]), os.fsdecode(row[2])
        path = f"{self._place}/{kind}/{name}"
        label = kind.replace("_", " ")
        fields = {"image": f"{kind}/{name}", "caption": self.template.replace("{}", label), "label": label}
        return [Record(path, f"{number:08d}", fields, (path,))]

    def _list(self, tables: Tables) -> int:
        """Every picture into the table; how much else there is."""
        passed_over = 0
        for file in self._files():
            if file is None:
                passed_over += 1
            else:
                tables.execute("INSERT INTO files VALUES (?, ?)", tuple(map(os.fsencode, file)))
        return passed_over

    def _files(self) -> Iterator[tuple[str, str] | None]:
        """Class and name of every picture, None for all else, in no order."""
        for kind in self._entries(self.src):
            if not kind.is_dir():
                yield None
                continue
            for file in self._entries(Path(kind.path)):
                yield (kind.name, file.name) if _is_picture(file) else None

    def _entries(self, folder: Path) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                yield from entries
        except OSError as error:
            raise UsageError(f"{folder}: can not be read ({error.strerror}); check its permissions") from None


def _is_picture(file: os.DirEntry[str]) -> bool:
    return not file.is_dir() and file.name.lower().endswith(_PICTURES)
