"""What a source of samples is: cheap rows, read in order, and how a row becomes records.

Knows records, options, and how fields and files name their images. Knows nothing of shards or of who works on which rows.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from vlm.errors import UsageError
from vlm.storage import is_address

# How the command line names what a source takes beside `src` and `images`.
FLAGS = {"columns": "--column", "annotations": "--annotations", "template": "--template"}
_TEXTS = ("caption", "captions", "question", "qa", "messages", "text")


class Record(NamedTuple):
    """One sample of a source: where it stands there, its fields as `interface.md` names them, its images.

    An image is a path, or the bytes of an encoded file.
    """

    place: str
    key: str
    fields: dict[str, Any]
    images: tuple[str | bytes, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """What can not be used, and why; so many samples are lost by it, none where it never was one."""

    reason: str
    samples: int = 1


class Source(ABC):
    """A source of one format. Made in the process that hands out rows, and pickled to those that work on them.

    src: what the command names. images: the folder that image paths start from; None: the format's own.
    """

    empty: str  # the mend where there is not one row
    options: tuple[str, ...] = ()  # what the constructor takes beside, of FLAGS
    whole_shards = False  # one row is a whole shard's worth of records

    def __init__(self, src: Path, images: Path | None) -> None:
        self.src = src
        self.images = images if images is not None else self.image_folder()
        if not self.images.is_dir():
            raise UsageError(f"{self.images}: no such folder; give the one that image paths start from")
        self._place, self._folder = str(src), os.path.join(self.images, "").removeprefix("./")

    def image_folder(self) -> Path:
        """Where images lie unless it is told: beside a file, in a folder."""
        return self.src if self.src.is_dir() else self.src.parent

    @abstractmethod
    def rows(self, scratch: Path) -> Iterator[Any]:
        """Every row in order, one at a time: little to read, small to pickle. Raises UsageError for the source as a whole.

        What can be told to be of no use without work on it is among them as Skipped.
        scratch: a folder for what does not fit into memory; it is removed when the conversion is done.
        """

    def image(self, path: str) -> str:
        """Where an image lies that is given by a path: a string, since making a Path takes as long as opening a file."""
        return path if path.startswith("/") else self._folder + path

    @abstractmethod
    def count(self) -> int | None:
        """About how many samples there are, for who waits for them; None where that can not be told."""

    @abstractmethod
    def records(self, row: Any) -> Iterable[Record | Skipped]:
        """The samples of a row that is not Skipped, and what of it can not be used.

        Raises UsageError, which names the row's place, where it holds none.
        """


def need_file(src: Path) -> None:
    """Raise UsageError unless the source is a file."""
    if not src.is_file():
        raise UsageError(f"{src}: {_absent(src, 'file')}")


def need_folder(src: Path) -> None:
    """Raise UsageError unless the source is a folder."""
    if not src.is_dir():
        raise UsageError(f"{src}: {_absent(src, 'folder')}")


def _absent(src: Path, kind: str) -> str:
    scheme, colon, _ = str(src).partition(":")
    if colon and len(scheme) > 1 and scheme.isalnum():
        return f"a command or an address, which is neither run nor fetched; download it and give the {kind}"
    return f"no such {kind}; check the path"


def opened(path: Path) -> IO[bytes]:
    """The file, behind its byte order mark if it has one. Raises UsageError where it can not be read."""
    try:
        file = open(path, "rb")
        if file.read(3) != b"\xef\xbb\xbf":
            file.seek(0)
        return file
    except OSError as error:
        raise UsageError(f"{path}: can not be read ({error.strerror}); check its permissions") from None


def lines_in(path: Path) -> int:
    """How often a line ends in a file."""
    with opened(path) as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))


def image_paths(place: str, fields: Mapping[str, Any]) -> list[str]:
    """The paths under "image" (one) or "images" (a list)."""
    if "image" in fields and "images" in fields:
        raise UsageError(f'{place}: both "image" and "images"; keep one')
    paths = [fields["image"]] if fields.get("image") is not None else fields.get("images") or []
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise UsageError(f'{place}: image paths are not strings; write "image": "a.png" or "images": ["a.png", …]')
    for path in paths:
        if is_address(path):
            raise UsageError(f"{place}: image {path}: an address; download them with img2dataset first")
    return paths


def need_text(place: str, fields: Mapping[str, Any]) -> None:
    """Raise UsageError for a picture of which nothing is said."""
    if not any(_says(fields.get(name)) for name in _TEXTS):
        raise UsageError(f"{place}: a picture without caption, question or text; fill one in")


def _says(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else bool(value)
