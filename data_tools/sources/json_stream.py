"""JSON files larger than memory, one item at a time. Knows the JSON parser and its errors, and nothing of what it reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import ijson

from vlm.errors import UsageError

from .base import opened

_DEPTH = 200  # brackets within brackets; the formats read here have fewer than ten
# What the parser keeps grows with the square of the depth, and the depth is looked at once for so many bytes.
_STEP = 8192


def json_items(path: Path, prefix: str) -> Iterator[Any]:
    """The values at a place of the file, `item` for those of a list, `images.item` for those of a list under a name.

    Raises UsageError, when it is reached, for what is not JSON.
    """
    with opened(path) as file:
        try:
            yield from ijson.items(_Shallow(path, file), prefix, buf_size=_STEP, use_float=True)
        except ijson.JSONError as error:
            raise UsageError(f"{path}: not JSON, or cut short ({_reason(error)}); download it again") from None


def json_text(path: Path, value: Any) -> str:
    """A value of the file as JSON of ASCII alone. Raises UsageError for one of too many brackets."""
    try:
        return json.dumps(value)
    except RecursionError:
        raise _too_deep(path) from None


class _Shallow:
    """A file that refuses, while it is read, to go deeper than `_DEPTH`."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path, self._file = path, file
        self._depth, self._in_string, self._escape = 0, False, b""

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        text = self._escape + data
        self._escape = b"\\" if (len(text) - len(text.rstrip(b"\\"))) % 2 else b""
        text = text.removesuffix(self._escape).replace(b"\\\\", b"").replace(b'\\"', b"")
        pieces = text.split(b'"')
        outside = b"".join(pieces[self._in_string :: 2])
        self._in_string ^= len(pieces) % 2 == 0
        self._depth += sum(map(outside.count, (b"[", b"{"))) - sum(map(outside.count, (b"]", b"}")))
        if self._depth > _DEPTH:
            raise _too_deep(self._path)
        return data


def _too_deep(path: Path) -> UsageError:
    return UsageError(f"{path}: more than {_DEPTH} brackets within brackets; check where the file comes from")


def _reason(error: Exception) -> str:
    told = error.args[0] if error.args else type(error).__name__
    return (told.decode("utf-8", "replace") if isinstance(told, bytes) else str(told)).splitlines()[0]
