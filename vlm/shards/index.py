"""`index.json`: which shards a folder holds, and what their bytes must be.

Knows the index and whether the files are there as it says. Knows nothing of what is in a tar.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.errors import RunError, UsageError
from vlm.storage import Folder, fetched, is_address, join, verify

INDEX = "index.json"
SHARD_NAME = "{:05d}.tar"


@dataclass(frozen=True)
class ShardFile:
    """One tar, near or far, and how many samples it holds; bytes and sha256 are None where no index promises them."""

    place: str
    samples: int
    bytes: int | None = None
    sha256: str | None = None

    def local(self) -> Path:
        """The tar on this disk, verified against the index. Raises UsageError for other bytes, RunError if it is gone."""
        if is_address(self.place):
            return fetched(self.place, self.sha256)
        path = Path(self.place)
        try:
            size = path.stat().st_size
            if self.bytes is not None and size < self.bytes:
                raise RunError(f"{path}: shorter than when it was opened; convert it again")
            if self.sha256 is not None:
                verify(path, self.sha256)
        except OSError as error:
            raise RunError(f"{path}: {error.strerror}; it was there when the data was opened") from None
        return path


def read_index(folder: str | Path) -> list[dict]:
    """The shards that `index.json` lists: `file`, `samples`, `bytes`, `sha256` of each. Raises UsageError."""
    try:
        data = Folder(folder).read_or_recall(INDEX)
        if data is None:
            raise UsageError(f"{folder}: no {INDEX}; a conversion that was cut short? run it again")
        shards = json.loads(data)["shards"]
        for shard in shards:
            name, _, _, _ = shard["file"], int(shard["samples"]), int(shard["bytes"]), str(shard["sha256"])
            if Path(name).name != name:
                raise ValueError(f"file {name!r} is not in the folder")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{join(folder, INDEX)}: can not be read ({error!r}); convert the data again") from None
    return shards


def indexed_files(folder: str | Path) -> list[ShardFile]:
    """The shards of a folder as its index lists them, found to be there. Raises UsageError for what is not."""
    shards = read_index(folder)
    if not is_address(folder):
        _check_present(Path(folder), shards)
    return [
        ShardFile(join(folder, shard["file"]), shard["samples"], shard["bytes"], shard["sha256"]) for shard in shards
    ]


def _check_present(folder: Path, shards: list[dict]) -> None:
    listed = {shard["file"] for shard in shards}
    unlisted = sorted(path.name for path in folder.glob("*.tar") if path.name not in listed)
    if unlisted:
        raise UsageError(f"{folder}: {unlisted[0]} is not in {INDEX}; move it away or see `vlm data inspect {folder}`")
    for shard in shards:
        path = folder / shard["file"]
        size = path.stat().st_size if path.is_file() else None
        if size != shard["bytes"]:
            found = "missing" if size is None else f"{size} bytes"
            raise UsageError(f"{path}: {found}, {INDEX} says {shard['bytes']} bytes; see `vlm data inspect {folder}`")


def write_index(folder: str | Path, shards: Sequence[Mapping[str, Any]]) -> None:
    """Write `index.json`, which makes a folder of shards whole; call it last."""
    index = {"samples": sum(shard["samples"] for shard in shards), "shards": list(shards)}
    with Folder(folder).write(INDEX) as file:
        file.write((json.dumps(index, indent=1) + "\n").encode())
