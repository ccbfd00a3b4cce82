"""The samples of shards by number, and every sample of one tar.

Knows which file name makes which key, and where each sample lies. Knows nothing of what is inside a picture or a JSON
part; no member is ever extracted to disk, decoded or run here.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from vlm.errors import RunError, UsageError
from vlm.samples import Sample, is_image_part, parse_sample
from vlm.storage import fetched, is_address

from .index import ShardFile, indexed_files
from .tar import members

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Entry:
    """Where one sample lies: its shard, its key, and per part the extension, offset and size in bytes."""

    shard: Path
    key: str
    parts: tuple[tuple[str, int, int], ...]

    def read(self) -> dict[str, bytes]:
        """The sample's files by extension. Raises RunError if the shard shrank or vanished since it was opened."""
        start, end = self.parts[0][1], max(offset + size for _, offset, size in self.parts)
        try:
            # Opened per sample: no handle is shared between forked data workers, and 15 µs are nothing beside a decode.
            with open(self.shard, "rb", buffering=0) as file:
                file.seek(start)
                data = file.read(end - start)
        except OSError as error:
            raise RunError(f"{self.shard}: {error.strerror}; it was there when the data was opened") from None
        if len(data) != end - start:
            raise RunError(f"{self.shard}: shorter than when it was opened; convert it again")
        return {extension: data[offset - start : offset - start + size] for extension, offset, size in self.parts}


class Shards(Sequence[Sample]):
    """The samples of some shards by number, in stored order.

    A shard is fetched, verified and its headers read when a sample of it is first asked for; what stays in memory of a
    sample is one number of 8 bytes.
    """

    def __init__(self, files: Sequence[ShardFile]) -> None:
        self.files = list(files)
        self._ends = list(accumulate(file.samples for file in self.files))
        self._opened: dict[int, tuple[Path, np.ndarray]] = {}

    @classmethod
    def open(cls, source: str | Path | Sequence[str | Path]) -> Shards:
        """Open a folder with its index, one tar, `name-{00000..00012}.tar`, or a list of these; paths or addresses.

        Raises UsageError naming the file and the mend: missing, truncated, not a tar, not as its index says.
        """
        sources = [source] if isinstance(source, str | Path) else list(source)
        shards = cls([file for one in sources for file in _files(one)])
        if not len(shards):
            raise UsageError(f"{', '.join(map(str, sources))}: no samples; see `vlm data inspect`")
        return shards

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        entry = self.entry(index)
        return parse_sample(entry.key, entry.read())

    def entry(self, index: int) -> Entry:
        """Where sample `index` lies."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        tar, starts = self._open(number)
        place = index - (self._ends[number - 1] if number else 0)
        return _entry_at(tar, int(starts[place]), int(starts[place + 1]))

    def first(self, count: int | None) -> Shards:
        """The first `count` samples alone; all for None."""
        kept, left = [], len(self) if count is None else count
        for file in self.files:
            kept.append(ShardFile(file.place, min(left, file.samples), file.bytes, file.sha256))
            left -= kept[-1].samples
        return Shards(kept)

    @property
    def entries(self) -> list[Entry]:
        """Every sample's place, in order."""
        return [self.entry(index) for index in range(len(self))]

    @property
    def keys(self) -> list[str]:
        """Every sample's key."""
        return [entry.key for entry in self.entries]

    def _open(self, number: int) -> tuple[Path, np.ndarray]:
        """The tar of shard `number` and where its samples start, with the end of the last (samples + 1,) int64."""
        if number not in self._opened:
            file = self.files[number]
            tar = file.local()
            starts = np.fromiter(_starts(tar), dtype=np.int64)
            if len(starts) - 1 < file.samples:
                raise UsageError(f"{tar}: {len(starts) - 1} samples, its index says {file.samples}; convert it again")
            self._opened[number] = tar, starts
        return self._opened[number]


def _files(source: str | Path) -> list[ShardFile]:
    """The shards that a source names."""
    if not str(source).endswith(".tar") if is_address(source) else Path(source).is_dir():
        return indexed_files(source)
    tars = [fetched(place) if is_address(place) else Path(place) for place in _numbered(source)]
    return [ShardFile(str(_present(tar)), sum(1 for _ in scan(tar))) for tar in tars]


def shard_files(source: str | Path) -> list[Path]:
    """The tars that a source names. A folder's index must be there and agree with the files. Raises UsageError."""
    if Path(source).is_dir():
        return [Path(file.place) for file in indexed_files(source)]
    return [_present(Path(place)) for place in _numbered(source)]


def _numbered(source: str | Path) -> list[str]:
    """`name-{00000..00012}.tar` as its thirteen names; any other name alone."""
    braces = _BRACES.search(str(source))
    if not braces:
        return [str(source)]
    first, last = braces.groups()
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [_BRACES.sub(number, str(source)) for number in numbers]


def _present(tar: Path) -> Path:
    if not tar.is_file():
        raise UsageError(f"{tar}: no such shard; make one with `vlm data convert` or `vlm data scenes`")
    return tar


def scan(tar: Path) -> Iterator[Entry]:
    """Every sample of one tar from its headers alone. Raises UsageError at the first fault of the tar or its names."""
    return (entry for _, entry in _samples(tar))


def _samples(tar: Path) -> Iterator[tuple[int, Entry]]:
    """Where the first header of each sample starts, and the sample."""
    key: str | None = None
    seen: set[str] = set()
    start = 0
    parts: list[tuple[str, int, int]] = []
    for header, name, offset, size in members(tar):
        stem, extension = split_name(tar, name)
        if stem != key:
            if key is not None:
                yield start, Entry(tar, key, tuple(parts))
            if stem in seen:
                raise UsageError(f"{tar}: key {stem} comes twice; give every sample its own")
            key, start, parts = stem, header, []
            seen.add(stem)
        if any(extension == other for other, _, _ in parts):
            raise UsageError(f"{tar}: {name} comes twice; give every sample its own key")
        parts.append((extension, offset, size))
    if key is not None:
        yield start, Entry(tar, key, tuple(parts))


def _starts(tar: Path) -> Iterator[int]:
    """Where each sample's first header starts, and where the last sample ends."""
    end = 0
    for start, entry in _samples(tar):
        yield start
        end = max(offset + size for _, offset, size in entry.parts)
    yield end


def _entry_at(tar: Path, start: int, end: int) -> Entry:
    """The sample between two offsets."""
    parts: list[tuple[str, int, int]] = []
    key = ""
    for _, name, offset, size in members(tar, start, end):
        key, extension = split_name(tar, name)
        parts.append((extension, offset, size))
    return Entry(tar, key, tuple(parts))


def split_name(tar: Path, name: str) -> tuple[str, str]:
    """`a/00017.0.png` -> key `a/00017`, extension `0.png`. Raises UsageError for names that would merge two samples."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    extension = extension.lower()
    if not stem or not dot:
        raise UsageError(f"{tar}: {name} has no key or no extension; name members KEY.png, KEY.json, …")
    if "." in extension and not is_image_part(extension):
        raise UsageError(f"{tar}: {name} has dots in its key, which merges samples; replace them")
    return folder + slash + stem, extension
