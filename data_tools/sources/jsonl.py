"""JSON lines: one object a line with the fields of a sample, its images under "image" or "images". Knows nothing else."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from vlm.errors import UsageError

from .base import Record, Source, image_paths, need_file

_JSON = json.JSONDecoder()


class JsonLines(Source):
    """A row is a line with its number; blank lines are passed over."""

    empty = "give one JSON object a line"

    def __init__(self, src: Path, images: Path | None) -> None:
        need_file(src)
        super().__init__(src, images)

    def rows(self, scratch: Path) -> Iterator[tuple[int, bytes]]:
        """Number, from 1, and bytes of each line."""
        with self._opened() as file:
            yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())

    def count(self) -> int:
        """Lines, blank ones among them."""
        with self._opened() as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))

    def _opened(self) -> IO[bytes]:
        try:
            return open(self.src, "rb")
        except OSError as error:
            raise UsageError(f"{self.src}: can not be read ({error.strerror}); check its permissions") from None

    def records(self, row: tuple[int, bytes]) -> Iterable[Record]:
        """The one sample of a line; its key is the line's number."""
        number, line = row
        place = f"{self._place} line {number}"
        try:
            fields = _JSON.decode(line.removeprefix(BOM_UTF8).decode())
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{place}: not JSON ({error}); write one object a line, in UTF-8") from None
        if not isinstance(fields, dict):
            raise UsageError(f"{place}: a {type(fields).__name__}; write one object a line")
        return [Record(place, f"{number:08d}", fields, tuple(map(self.image, image_paths(place, fields))))]
