"""Pictures and files for a source to read, and the reading; a small set of shards."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shard_files import fields, png
from source_files import encoded

from vlm.data_tools.sources import Record, Skipped, open_source
from vlm.errors import UsageError
from vlm.shards import ShardWriter


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


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Four samples in two shards: caption and questions, two images, a conversation, plain text."""
    colour = {"question": "What colour is it?", "answer": "red", "type": "colour"}
    with ShardWriter(tmp_path / "set", samples_per_shard=2) as writer:
        writer.write(
            "a", {"png": png(0), "json": fields(caption="a red square", qa=[colour, colour | {"answer": "blue"}])}
        )
        writer.write(
            "b", {"0.png": png(1, (20, 6)), "1.png": png(2), "json": fields(question="Same?", answer="not at all")}
        )
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hm hm?"}]}]
        writer.write("c", {"png": png(3), "json": fields(messages=chat, caption="a red square")})
        writer.write("d", {"json": fields(text="five words of plain text")})
    return tmp_path / "set"  # fmt: skip
