"""Shards: WebDataset tars with an index beside them, written whole and read at random.

Knows tar headers, `index.json` and which file name makes which key. Knows nothing of what is inside a picture or a JSON
part; no member is ever extracted to disk, decoded or run here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from vlm.errors import RunError, UsageError
from vlm.files import atomic_folder, start_storing, write_blocks
from vlm.samples import Sample, is_image_part, parse_sample
from vlm.storage import Folder, fetched, is_address, join, verify

INDEX = "index.json"
SHARD_NAME = "{:05d}.tar"
BLOCK = tarfile.BLOCKSIZE  # bytes
AT_ONCE = 1 << 20  # bytes that one call writes: the fewer calls, the less each costs
STORED_AT_ONCE = 1 << 23  # bytes that the disk is told to begin with
_ZEROS = bytes(BLOCK)
COPIED = 1 << 14  # bytes up to which a block is copied beside its neighbours
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_OCTAL = re.compile(rb"[0-7]+")
_TIMES = re.compile(rb"(?:\d+ [acm]time=[\d.]+\n)+")  # of an extended header that says no more
_PLAIN = (b"0", b"\0")  # types of a tar header that says all there is to say of a regular file


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


def members(tar: Path, start: int = 0, end: int | None = None) -> Iterator[tuple[int, str, int, int]]:
    """Offset of the header, name, offset and size of every regular file, of the whole tar or from `start` to `end`.

    Links, devices and folders are nothing that a sample is made of.
    """
    try:
        with open(tar, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            here, stop = start, length if end is None else end
            while here < stop and (header := _header_at(file, here)) is not None:
                name, offset, size, regular = header
                first, here = here, offset + -(-size // BLOCK) * BLOCK
                if regular and here <= length:
                    yield first, name, offset, size
        # A tar cut between two members reads as a shorter one; what tells is the empty block that ends it.
        if end is None and here + BLOCK > length:
            raise UsageError(f"{tar}: truncated at {length} bytes; copy or convert it again")
    except tarfile.TarError as error:
        raise UsageError(f"{tar}: not an uncompressed tar ({error}); convert the data again") from None
    except OSError as error:
        raise UsageError(f"{tar}: {error.strerror or error}; check the path and its permissions") from None


def _header_at(file: IO[bytes], here: int) -> tuple[str, int, int, bool] | None:
    """Name, offset, size and whether it is a regular file, of the member at `here`; None at the end, or past it.

    The headers that nearly every member has are read here, in a tenth of the time; tarfile reads the others.
    """
    file.seek(here)
    block = file.read(BLOCK)
    if not block.strip(b"\0") or (here and len(block) < BLOCK):
        return None
    plain = _plain_header(block)
    if plain is not None and plain[0] == b"x" and plain[2] <= BLOCK and _TIMES.fullmatch(file.read(BLOCK)[: plain[2]]):
        # webdataset, and so img2dataset, puts a header with the time in fractions of a second before every member.
        plain, start = _plain_header(file.read(BLOCK)), here + 2 * BLOCK
    else:
        start = here
    if plain is not None and plain[0] in _PLAIN and not plain[1].endswith(b"/"):
        return plain[1].decode("utf-8", "surrogateescape"), start + BLOCK, plain[2], True
    file.seek(here)
    member = tarfile.TarFile(fileobj=file).next()
    if member is None:  # tarfile takes a damaged header for the end
        raise tarfile.ReadError(f"invalid header at byte {here}")
    if member.issparse():  # its size is more than what is stored: it would take what follows for a part of it
        raise tarfile.ReadError(f"a file with holes at byte {here}")
    return member.name, member.offset_data, member.size if member.isreg() else 0, member.isreg()


def _plain_header(block: bytes) -> tuple[bytes, bytes, int] | None:
    """Type, name and size that a header of ordinary numbers gives; None for any other."""
    fields = block[124:136].rstrip(b"\0 "), block[148:156].rstrip(b"\0 ")
    if len(block) < BLOCK or block[257:262] != b"ustar" or not all(map(_OCTAL.fullmatch, fields)):
        return None
    size, checksum = (int(field, 8) for field in fields)
    if checksum != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        return None
    name = (block[345:500].rstrip(b"\0") + b"/" if block[345] else b"") + block[:100].partition(b"\0")[0]
    return block[156:157], name, size


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` when the block ends well, and vanishes when it does not.

    Raises UsageError if something stands at `path` already or nothing can be written there.
    """
    path = Path(path)
    with ExitStack() as stack:
        try:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise UsageError(f"{path}: already there; choose another folder or remove it")
            folder = stack.enter_context(atomic_folder(path))
        except OSError as error:
            raise UsageError(f"{path}: can not be written ({error.strerror}); choose another folder") from None
        yield folder


class ShardFileWriter:
    """Writes samples into one tar and counts and hashes them on the way. A tar that was not closed is not whole.

    Bytes depend on nothing but what is written: no time, owner or machine is in a header. `file` is open, has nothing in
    its buffer and is written to by nobody else; samples are held back until there are AT_ONCE bytes of them.
    """

    def __init__(self, file: IO[bytes], name: str) -> None:
        self.name, self.samples, self.bytes = name, 0, 0
        self._file, self._digest = file, hashlib.sha256()
        self._keys: set[str] = set()
        self._waiting: list[bytes] = []
        self._small: list[bytes] = []  # after those
        self._written = self._stored = 0

    def write(self, key: str, parts: Mapping[str, bytes]) -> None:
        """Add one sample. Raises UsageError for a key that is empty, has dots, or was written before."""
        if "." in key or not key or key.endswith("/"):
            raise UsageError(f"key {key!r} is empty or has dots, which merges samples; replace them")
        if key in self._keys:
            raise UsageError(f"key {key!r} comes twice; give every sample its own")
        if not parts:
            raise UsageError(f"key {key!r} has no parts; give an image, .txt or .json part")
        self._keys.add(key)
        for extension, data in parts.items():
            size = len(data)
            self._add(tar_header(f"{key}.{extension}", size))
            self._add(data)
            self._add(_ZEROS[: -size % BLOCK])
        if self.bytes - self._written >= AT_ONCE:
            self._flush()
        self.samples += 1

    def size_with(self, parts: Mapping[str, bytes]) -> int:
        """How many bytes the tar would have, closed after one sample more with a key of usual length."""
        used = self.bytes + sum(BLOCK + -(-len(data) // BLOCK) * BLOCK for data in parts.values()) + 2 * BLOCK
        return -(-used // tarfile.RECORDSIZE) * tarfile.RECORDSIZE

    def close(self) -> dict[str, Any]:
        """End the tar and return its line of the index: `file`, `samples`, `bytes`, `sha256`."""
        self._add(_ZEROS)
        self._add(_ZEROS)
        self._add(bytes(-self.bytes % tarfile.RECORDSIZE))
        self._flush()
        return {
            "file": self.name,
            "samples": self.samples,
            "bytes": self.bytes,
            "sha256": self._digest.hexdigest(),
        }

    def _add(self, block: bytes) -> None:
        """A large block waits as it is, small ones to be copied together."""
        self.bytes += len(block)
        if len(block) > COPIED:
            self._waiting += [b"".join(self._small), block]
            self._small = []
        else:
            self._small.append(block)

    def _flush(self) -> None:
        """Hash and write what waits."""
        blocks = [*self._waiting, b"".join(self._small)]
        for block in blocks:
            self._digest.update(block)
        write_blocks(self._file, blocks)
        self._waiting, self._small, self._written = [], [], self.bytes
        if self._written - self._stored >= STORED_AT_ONCE:
            start_storing(self._file, self._stored, self._written)
            self._stored = self._written


def tar_header(name: str, size: int) -> bytes:
    """The tar header of a regular file: tarfile's, whose fixed fields are taken from a template where they suffice."""
    encoded = name.encode("utf-8", "surrogateescape")
    if len(encoded) > 100 or not name.isascii() or size >= 8**11:
        member = tarfile.TarInfo(name)
        member.size = size
        return member.tobuf(tarfile.PAX_FORMAT)
    digits = b"%011o" % size
    return _TEMPLATE % (encoded.ljust(100, b"\0"), digits, _TEMPLATE_SUM + sum(encoded) + sum(digits))


def _template() -> tuple[bytes, int]:
    """A header with places for name, size and checksum, and the sum of all its bytes but the first two of these."""
    plain = tarfile.TarInfo("").tobuf(tarfile.PAX_FORMAT)
    before, between, after = plain[100:124], plain[135:148], plain[156:]
    # The checksum's own bytes count as spaces.
    return b"%b" + before + b"%b" + between + b"%06o\0 " + after, sum(before + between + b" " * 8 + after)


_TEMPLATE, _TEMPLATE_SUM = _template()


def write_index(folder: str | Path, shards: Sequence[Mapping[str, Any]]) -> None:
    """Write `index.json`, which makes a folder of shards whole; call it last."""
    index = {"samples": sum(shard["samples"] for shard in shards), "shards": list(shards)}
    with Folder(folder).write(INDEX) as file:
        file.write((json.dumps(index, indent=1) + "\n").encode())


class ShardWriter:
    """Writes samples into a new folder of shards, `index.json` last; a context manager.

    The folder appears whole when the block ends well; on any error nothing is left.
    """

    def __init__(self, out: str | Path, *, samples_per_shard: int = 1000) -> None:
        self.samples_per_shard = samples_per_shard
        self._whole = new_folder(out)
        self._keys: set[str] = set()
        self._index: list[dict[str, Any]] = []
        self._file: IO[bytes] | None = None

    def __enter__(self) -> ShardWriter:
        self._folder = self._whole.__enter__()
        return self

    def write(self, key: str, parts: Mapping[str, bytes]) -> None:
        """Add one sample. Raises UsageError for a key that is empty, has dots, or was written before."""
        if key in self._keys:
            raise UsageError(f"key {key!r} comes twice; give every sample its own")
        if self._file is None:
            name = SHARD_NAME.format(len(self._index))
            self._file = open(self._folder / name, "wb")
            self._shard = ShardFileWriter(self._file, name)
        self._shard.write(key, parts)
        self._keys.add(key)
        if self._shard.samples == self.samples_per_shard:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._file is not None:
            self._index.append(self._shard.close())
            self._file.close()
            self._file = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        with ExitStack() as stack:
            stack.push(self._whole)
            if error is not None:
                if self._file is not None:
                    self._file.close()
                raise error
            self._finish_shard()
            write_index(self._folder, self._index)
        return None
