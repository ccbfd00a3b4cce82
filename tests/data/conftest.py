"""Pictures and files for a source to read, and the reading."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from source_files import encoded

from vlm.data_tools.sources import Record, Skipped, open_source
from vlm.errors import UsageError


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with `0.jpg` to `4.jpg`."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.jpg").write_bytes(encoded(number))
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file: bytes and text as they are, all else as JSON."""

    def to(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, bytes | str):
            content = json.dumps(content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return to


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., tuple[list[Record], list[Skipped]]]:
    """The records of a source and what it skips, as another process would see them: source and rows are pickled."""

    def of(format: str, src: Path, images: Path | None = None, **options: Any) -> tuple[list[Record], list[Skipped]]:
        source = open_source(format, src, images, **options)
        rows = [pickle.loads(pickle.dumps(row)) for row in source.rows(tmp_path / "scratch")]
        assert rows == list(source.rows(tmp_path / "scratch")), "rows come again as they came"
        source = pickle.loads(pickle.dumps(source))
        found: list[Record | Skipped] = []
        for row in rows:
            try:
                found += [row] if isinstance(row, Skipped) else source.records(row)
            except UsageError as error:
                found.append(Skipped(str(error)))
        records = [one for one in found if isinstance(one, Record)]
        skipped = [one for one in found if isinstance(one, Skipped)]
        assert len({record.key for record in records}) == len(records) and not any("." in one.key for one in records)
        assert all("\n" not in one.reason for one in skipped)
        return records, skipped

    return of
