"""CSV and TSV: a line of column names, then a sample a line, its images by path. Knows RFC 4180 and the names of columns.

Knows nothing of other tables: no spreadsheet file is opened here.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from vlm.errors import UsageError

from .base import Record, Skipped, Source, image_paths, lines_in, need_file, need_text, opened

_LISTS = ("images", "captions", "answers", "qa", "messages")  # fields whose cell holds a JSON list
_PICTURES = ("image", "images", "messages", "text")  # a table needs a column of these, and
_WORDS = ("caption", "captions", "question", "qa", "messages", "text")  # one of these


class CsvTable(Source):
    """A row is the number of the line that it starts on, and its cells.

    columns: which column holds a field of the sample, {"caption": "title"}; others are fields of their own name, and a
    column whose name another one was given is left out. The separator is the first of comma, semicolon and tab (.tsv: tab
    first) that stands in the line of names. An empty cell is a field that the sample does not have.
    """

    empty = "write a sample a line below the column names"
    options = ("columns",)

    def __init__(self, src: Path, images: Path | None, columns: Mapping[str, str] | None = None) -> None:
        need_file(src)
        super().__init__(src, images)
        self.columns = dict(columns or {})
        self.separator = self._separator()
        self.names = self._names()

    def rows(self, scratch: Path) -> Iterator[tuple[int, list[str]] | Skipped]:
        """Number of the line, from 1, and cells; a row whose quotes are not in order is Skipped."""
        with opened(self.src) as file:
            lines = self._reader(file)
            next(lines)
            while True:
                number = lines.line_num + 1
                try:
                    cells = next(lines)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield Skipped(self._misquoted(number, lines.line_num, error))
                else:
                    if cells:
                        yield number, cells

    def count(self) -> int:
        """Lines below the first, as if no cell had more than one."""
        return max(0, lines_in(self.src) - 1)

    def records(self, row: tuple[int, list[str]]) -> Iterable[Record]:
        """The one sample of a row; its key is the number of its line."""
        number, cells = row
        place = f"{self.src} line {number}"
        if len(cells) != len(self.names):
            raise UsageError(
                f"{place}: {len(cells)} cells, the first line names {len(self.names)}; quote cells that hold a "
                f"{_named(self.separator)}"
            )
        fields = {name: self._value(place, name, cell) for name, cell in zip(self.names, cells, strict=True) if cell}
        fields.pop("", None)
        paths = image_paths(place, fields)
        if not paths and not fields.get("text") and not fields.get("messages"):
            raise UsageError(f"{place}: no image; give its path under {self._column('image')!r}")
        need_text(place, fields)
        return [Record(place, f"{number:08d}", fields, tuple(map(self.image, paths)))]

    def _reader(self, file: Any) -> Any:
        text = TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")
        return csv.reader(text, delimiter=self.separator, strict=True)

    def _separator(self) -> str:
        order = "\t,;" if self.src.suffix.lower() in (".tsv", ".tab") else ",;\t"
        with opened(self.src) as file:
            first = file.readline(2**20)
        if first.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UsageError(f"{self.src}: UTF-16; save it as UTF-8")
        return next((separator for separator in order if separator.encode() in first), order[0])

    def _names(self) -> list[str]:
        """The field of each column, empty for those that are left out."""
        with opened(self.src) as file:
            try:
                found = [name.strip() for name in next(self._reader(file), [])]
            except csv.Error as error:
                raise UsageError(self._misquoted(1, 1, error)) from None
        if not any(found):
            raise UsageError(f"{self.src}: no column names in its first line; write image,caption there")
        twice = next((name for name in found if name and found.count(name) > 1), None)
        if twice is not None:
            raise UsageError(f"{self.src}: column {twice!r} comes twice; rename one")
        for field, column in self.columns.items():
            if column not in found:
                raise UsageError(f"{self.src}: {self._none_called(column, found)}; give --column {field}=NAME")
        self._check_needed(found)
        fields = {column: field for field, column in self.columns.items()}
        return [fields.get(name, "" if name in self.columns else name) for name in found]

    def _check_needed(self, found: list[str]) -> None:
        for needed in (_PICTURES, _WORDS):
            if not any(name in found or name in self.columns for name in needed):
                mend = f"name it with --column {needed[0]}=NAME"
                raise UsageError(f"{self.src}: {self._none_called(needed[0], found)}; {mend}")

    def _none_called(self, name: str, found: list[str]) -> str:
        return f"no column {name!r} among {', '.join(filter(None, found))}"

    def _column(self, field: str) -> str:
        return self.columns.get(field, field)

    def _value(self, place: str, name: str, cell: str) -> Any:
        try:
            cell.encode()
        except UnicodeEncodeError:
            raise UsageError(f"{place}: column {self._column(name)!r} is not UTF-8; save it as UTF-8") from None
        if name == "question_id" and cell.strip().isdecimal():
            return int(cell)
        return self._list(place, name, cell) if name in _LISTS else cell

    def _list(self, place: str, name: str, cell: str) -> list[Any]:
        try:
            value = json.loads(cell)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, list):
            raise UsageError(f'{place}: column {self._column(name)!r} holds no list; write it as JSON, ["…", "…"]')
        return value

    def _misquoted(self, first: int, last: int, error: csv.Error) -> str:
        lines = f"line {first}" if first >= last else f"lines {first} to {last}"
        return f'{self.src} {lines}: {error}; close every quote, and double one that stands within quotes ("")'


def _named(separator: str) -> str:
    return {",": "comma", ";": "semicolon", "\t": "tab"}[separator]
