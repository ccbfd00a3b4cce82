"""Reads the files that benchmarks are published as: JSON, JSON lines, tables, parquet, folders of pictures.

Knows how each kind can be missing, cut short or of another kind, and says so in one line with the mend. Knows nothing of
any benchmark. Pictures are never opened here.
"""

from __future__ import annotations

import csv
import io
import json
import pickle
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlm.errors import UsageError

NAMED = 3
PICTURES = (".jpg", ".jpeg", ".png", ".webp")


def first_named(names: Sequence[Any]) -> str:
    """The first few names, and dots where there are more."""
    return ", ".join(map(str, names[:NAMED])) + (", …" if len(names) > NAMED else "")


def check_there(folder: Path, paths: Iterable[Path], what: str) -> None:
    """UsageError with the numbers and the first names where some of the paths are missing."""
    wanted = list(dict.fromkeys(paths))
    missing = [
        path.relative_to(folder) if path.is_relative_to(folder) else path for path in wanted if not path.exists()
    ]
    if missing:
        numbers = f"{len(missing)} of {len(wanted)} {what} are missing ({first_named(missing)})"
        raise UsageError(f"{folder}: {numbers}; finish the download or give another --data")


def files(folder: Path, *names: str) -> list[Path]:
    """The paths of all these files. Raises UsageError that counts and names the missing ones."""
    paths = [folder / name for name in names]
    check_there(folder, paths, "files")
    return paths


def first_of(folder: Path, *patterns: str) -> Path:
    """The one file or folder that fits the first pattern that any fits. Raises UsageError for none, or for several."""
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise UsageError(f"{folder}: {len(found)} files fit {pattern} ({first_named(found)}); keep 1 of them there")
        if found:
            return found[0]
    raise UsageError(f"{folder}: 0 of the files {' or '.join(patterns)} are there; download one or give another --data")


def read_json(path: Path) -> Any:
    """A JSON file."""
    return _read(path, lambda: json.loads(path.read_text("utf-8-sig")), "JSON")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A file with one JSON object a line."""
    # Not `splitlines`: in a string of JSON there may be line separators of Unicode, which it takes for line ends.
    lines = _read(path, lambda: path.read_text("utf-8-sig").split("\n"), "text")
    return _read(path, lambda: [json.loads(line) for line in lines if line.strip()], "JSON lines")


def read_table(path: Path, delimiter: str = "\t") -> list[dict[str, str]]:
    """A table whose first line names the columns, quoted as Excel does."""

    def rows() -> list[dict[str, str]]:
        with open(path, encoding="utf-8-sig", newline="") as file, _long_fields():
            return [dict(row) for row in csv.DictReader(file, delimiter=delimiter)]

    return _read(path, rows, "a table")


@contextmanager
def _long_fields() -> Iterator[None]:
    """A picture in base64 is longer than csv lets a field be, for everybody in the process."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def read_parquet(path: Path) -> Any:
    """A parquet file as a pyarrow Table. Raises UsageError where pyarrow is not installed."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise UsageError(f"{path}: pyarrow is not installed; pip install 'vlm[parquet]'") from None
    return _read(path, lambda: parquet.read_table(path), "parquet")


def read_pickle(path: Path) -> Any:
    """A pickle of plain values and NumPy arrays. Whatever else it would call is refused, never run."""
    return _read(path, lambda: _Plain(io.BytesIO(path.read_bytes()), encoding="latin1").load(), "a pickle of arrays")


class _Plain(pickle.Unpickler):
    """Knows the names that a pickled array needs, as Python 2 and 3 wrote them."""

    allowed = frozenset(["numpy._reconstruct", "numpy.ndarray", "numpy.dtype", "_codecs.encode"])

    def find_class(self, module: str, name: str) -> Any:
        if f"{module.split('.')[0]}.{name}" in self.allowed:
            return super().find_class(module, name)
        raise ValueError(f"it would call {module}.{name}")


def section(path: Path, content: Any, name: str) -> list[dict[str, Any]]:
    """The list `name` in an object of a file. Raises UsageError for a file of another kind."""
    entries = content.get(name) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UsageError(f'{path}: no list "{name}" is in it; give the official file of {name}')
    return entries


def by_id(path: Path, entries: Iterable[Mapping[str, Any]], key: str) -> dict[Any, Mapping[str, Any]]:
    """The entries by their id. Raises UsageError where one is given twice."""
    listed = list(entries)
    twice = [one for one, count in Counter(entry[key] for entry in listed).items() if count > 1]
    if twice:
        raise UsageError(
            f"{path}: {len(twice)} {key}s are given more than once ({first_named(twice)}); keep one of each"
        )
    return {entry[key]: entry for entry in listed}


def check_same(path: Path, given: Iterable[Hashable], wanted: Iterable[Hashable], what: str) -> None:
    """UsageError with the numbers missing and extra, and the first of each, where two sets of ids differ."""
    has, needs = dict.fromkeys(given), dict.fromkeys(wanted)
    missing, extra = [one for one in needs if one not in has], [one for one in has if one not in needs]
    faults = [f"{len(missing)} of {len(needs)} missing ({first_named(missing)})"] if missing else []
    faults += [f"{len(extra)} extra ({first_named(extra)})"] if extra else []
    if faults:
        raise UsageError(f"{path}: does not match the {what}: {', '.join(faults)}; download both again")


def pictures_in(folder: Path) -> list[Path]:
    """The pictures that lie in a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)


def _read(path: Path, read: Callable[[], Any], kind: str) -> Any:
    try:
        return read()
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; finish the download or give another --data") from None
    except OSError as error:
        raise UsageError(f"{path}: can not be read ({error.strerror or error}); download it again") from None
    except (ValueError, EOFError, RecursionError, csv.Error, pickle.UnpicklingError) as error:
        raise UsageError(f"{path}: not {kind} ({error}); a download that was cut short? fetch it again") from None
