"""Shards: WebDataset tars with an index beside them, written whole and read at random.

Knows tar headers, `index.json` and which file name makes which key. Knows nothing of what is inside a picture or a JSON
part; no member is ever extracted to disk, decoded or run here.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from vlm.errors import RunError, UsageError
from vlm.files import atomic_folder
from vlm.samples import Sample, is_image_part, parse_sample

INDEX = "index.json"
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Entry:
    """Where one sample lies: its shard, its key, and per part the extension, offset and size in bytes."""

    shard: Path
    key: str
    parts: tuple[tuple[str, int, int], ...]

    def read(self) -> dict[str, bytes]:
        """The sample's files by extension. Raises RunError if the shard shrank or vanished since it was opened."""
        parts = {}
        try:
            # Opened per sample: no handle is shared between forked data workers, and 15 µs are nothing beside a decode.
            with open(self.shard, "rb") as file:
                for extension, offset, size in self.parts:
                    file.seek(offset)
                    parts[extension] = file.read(size)
        except OSError as error:
            raise RunError(f"{self.shard}: {error.strerror}; it was there when the data was opened") from None
        if any(len(parts[extension]) != size for extension, _, size in self.parts):
            raise RunError(f"{self.shard}: shorter than when it was opened; convert it again")
        return parts


class Shards(Sequence[Sample]):
    """The samples of some shards by number, in stored order. Tar headers are read once, parts on demand."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = list(entries)

    @classmethod
    def open(cls, source: str | Path | Sequence[str | Path]) -> Shards:
        """Open a folder with its index, one tar, `name-{00000..00012}.tar`, or a list of these.

        Raises UsageError naming the file and the mend: missing, truncated, not a tar, not as its index says.
        """
        sources = [source] if isinstance(source, str | Path) else list(source)
        entries = [entry for one in sources for tar in shard_files(one) for entry in scan(tar)]
        if not entries:
            raise UsageError(f"{', '.join(map(str, sources))}: no samples; see `vlm data inspect`")
        return cls(entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        entry = self.entries[index]
        return parse_sample(entry.key, entry.read())

    @property
    def keys(self) -> list[str]:
        """Every sample's key."""
        return [entry.key for entry in self.entries]


def shard_files(source: str | Path) -> list[Path]:
    """The tars that a source names. A folder's index must be there and agree with the files. Raises UsageError."""
    braces = _BRACES.search(str(source))
    if braces:
        first, last = braces.groups()
        numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
        files = [Path(_BRACES.sub(number, str(source))) for number in numbers]
    elif Path(source).is_dir():
        return _indexed(Path(source))
    else:
        files = [Path(source)]
    for file in files:
        if not file.is_file():
            raise UsageError(f"{file}: no such shard; make one with `vlm data convert` or `vlm data scenes`")
    return files


def read_index(folder: Path) -> list[dict]:
    """The shards that `index.json` lists: `file`, `samples`, `bytes`, `sha256` of each. Raises UsageError."""
    try:
        shards = json.loads((folder / INDEX).read_text("utf-8"))["shards"]
        for shard in shards:
            name, _, _, _ = shard["file"], int(shard["samples"]), int(shard["bytes"]), str(shard["sha256"])
            if Path(name).name != name:
                raise ValueError(f"file {name!r} is not in the folder")
    except FileNotFoundError:
        raise UsageError(f"{folder}: no {INDEX}; a conversion that was cut short? run it again") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{folder / INDEX}: can not be read ({error!r}); convert the data again") from None
    return shards


def _indexed(folder: Path) -> list[Path]:
    shards = read_index(folder)
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
    return [folder / shard["file"] for shard in shards]


def scan(tar: Path) -> Iterator[Entry]:
    """Every sample of one tar from its headers alone. Raises UsageError at the first fault of the tar or its names."""
    key: str | None = None
    seen: set[str] = set()
    parts: list[tuple[str, int, int]] = []
    for name, offset, size in _members(tar):
        stem, extension = split_name(tar, name)
        if stem != key:
            if key is not None:
                yield Entry(tar, key, tuple(parts))
            if stem in seen:
                raise UsageError(f"{tar}: key {stem} comes twice; give every sample its own")
            key, parts = stem, []
            seen.add(stem)
        if any(extension == other for other, _, _ in parts):
            raise UsageError(f"{tar}: {name} comes twice; give every sample its own key")
        parts.append((extension, offset, size))
    if key is not None:
        yield Entry(tar, key, tuple(parts))


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


def _members(tar: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of every regular file. Links, devices and folders are nothing that a sample is made of."""
    try:
        length = tar.stat().st_size
        with tarfile.open(tar, "r:") as archive:
            end = 0
            for member in archive:
                end = member.offset_data + (-(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
                if end > length:
                    break
                if member.isreg():
                    yield member.name, member.offset_data, member.size
        # A tar cut between two members reads as a shorter one; what tells is the empty block that ends it.
        if end + tarfile.BLOCKSIZE > length:
            raise UsageError(f"{tar}: truncated at {length} bytes; copy or convert it again")
    except tarfile.TarError as error:
        raise UsageError(f"{tar}: not an uncompressed tar ({error}); convert the data again") from None
    except OSError as error:
        raise UsageError(f"{tar}: {error.strerror or error}; check the path and its permissions") from None


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


class ShardWriter:
    """Writes samples into a new folder of shards, `index.json` last; a context manager.

    The folder appears whole when the block ends well; on any error nothing is left. Bytes depend on nothing but what is
    written: no time, owner or machine is in a header.
    """

    def __init__(self, out: str | Path, *, samples_per_shard: int = 1000, name: str = "{:05d}.tar") -> None:
        self.samples_per_shard, self.name = samples_per_shard, name
        self._whole = new_folder(out)
        self._keys: set[str] = set()
        self._index: list[dict[str, object]] = []
        self._tar: tarfile.TarFile | None = None
        self._in_shard = 0

    def __enter__(self) -> ShardWriter:
        self._folder = self._whole.__enter__()
        return self

    def write(self, key: str, parts: Mapping[str, bytes]) -> None:
        """Add one sample. Raises UsageError for a key that is empty, has dots, or was written before."""
        base = key.rpartition("/")[2]
        if not base or "." in key:
            raise UsageError(f"key {key!r} is empty or has dots, which merges samples; replace them")
        if key in self._keys:
            raise UsageError(f"key {key!r} comes twice; give every sample its own")
        if not parts:
            raise UsageError(f"key {key!r} has no parts; give an image, .txt or .json part")
        self._keys.add(key)
        if self._tar is None:
            self._path = self._folder / self.name.format(len(self._index))
            self._tar = tarfile.open(self._path, "w", format=tarfile.PAX_FORMAT)
        for extension, data in parts.items():
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))
        self._in_shard += 1
        if self._in_shard == self.samples_per_shard:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._tar is None:
            return
        path, samples = self._path, self._in_shard
        self._tar.close()
        self._tar, self._in_shard = None, 0
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._index.append({"file": path.name, "samples": samples, "bytes": path.stat().st_size, "sha256": digest})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        with ExitStack() as stack:
            stack.push(self._whole)
            if error is not None:
                if self._tar is not None:
                    self._tar.fileobj.close()
                raise error
            self._finish_shard()
            index = {"samples": len(self._keys), "shards": self._index}
            (self._folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", "utf-8")
        return None
