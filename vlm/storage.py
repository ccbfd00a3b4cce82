"""Where bytes lie: a folder on a disk, or one behind an address such as `s3://bucket/data`.

Knows paths, addresses (whatever fsspec knows), checksums and the cache of what was fetched. Knows nothing of what is in
a file. No filesystem object is kept: a connection does not survive a fork, and fsspec makes a new one in each process.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import fsspec

from vlm.errors import RunError, UsageError
from vlm.files import atomic_write, room_for


def is_address(place: str | os.PathLike) -> bool:
    """Whether a place is an address, `s3://…`, and not a path."""
    return "://" in os.fspath(place)


def join(place: str | os.PathLike, name: str) -> str:
    """`name` in the folder `place`."""
    return f"{os.fspath(place).rstrip('/')}/{name}"


def cache_folder() -> Path:
    """Where fetched shards and notes of verified ones lie: VLM_CACHE, else `vlm` in the user's cache folder."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VLM_CACHE") or Path(caches) / "vlm")


class Folder:
    """One folder, near or far. Picklable; every file in it is whole or not there. Errors name the place."""

    def __init__(self, place: str | os.PathLike) -> None:
        self.place = os.fspath(place)

    def __str__(self) -> str:
        return self.place

    @contextmanager
    def write(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file that is there when the block ends well, and only then."""
        if not is_address(self.place):
            with atomic_write(Path(self.place, name)) as file:
                yield file
            return
        # Sent from a file and not as it comes: an upload that is broken off while open would be closed, and look whole.
        with room_for(tempfile.gettempdir()), tempfile.NamedTemporaryFile() as file:
            yield file
            file.flush()
            with reached(join(self.place, name)) as (filesystem, path):
                try:
                    filesystem.put_file(file.name, path)
                except FileNotFoundError:
                    raise RunError(f"{self.place}: no such bucket or folder; make it first") from None

    def read(self, name: str) -> bytes | None:
        """The bytes of a file, None where it is not there."""
        with reached(join(self.place, name)) as (filesystem, path):
            try:
                return filesystem.cat_file(path)
            except FileNotFoundError:
                return None

    def read_or_recall(self, name: str) -> bytes | None:
        """As `read`; of a far file that can not be reached, with a warning, the bytes that it had when last read so."""
        if not is_address(self.place):
            return self.read(name)
        kept = cache_folder() / "read" / _hash(join(self.place, name))
        try:
            data = self.read(name)
        except RunError as error:
            if not kept.is_file():
                raise
            warnings.warn(f"{error}; going on with the copy of the last time", stacklevel=2)
            return kept.read_bytes()
        if data is not None:
            with suppress(OSError), atomic_write(kept) as file:
                file.write(data)
        return data

    def names(self) -> list[str]:
        """The names of what stands in the folder, sorted; none where there is no folder. A hidden one is not whole yet."""
        with reached(self.place) as (filesystem, path):
            filesystem.invalidate_cache()
            try:
                found = (os.path.basename(entry.rstrip("/")) for entry in filesystem.ls(path, detail=False))
                return sorted(name for name in found if name and not name.startswith("."))
            except FileNotFoundError:
                return []

    def remove(self, name: str = "") -> None:
        """Remove a file or folder in it, or the folder itself; it need not be there. A bucket stays, emptied."""
        with reached(join(self.place, name).rstrip("/")) as (filesystem, path):
            filesystem.invalidate_cache()
            if not filesystem.exists(path):
                return
            # Asked to remove a bucket, some storages do.
            bucket = is_address(self.place) and "/" not in path.strip("/")
            entries = filesystem.ls(path, detail=False) if bucket else [path]
            if entries:
                filesystem.rm(entries, recursive=True)


@contextmanager
def reached(place: str) -> Iterator[tuple[Any, str]]:
    """The filesystem of a place and the path on it; what goes wrong with a far one becomes one line that names it."""
    if not is_address(place):
        yield fsspec.filesystem("file"), place
        return
    try:
        yield _resolved(place)
    except (UsageError, RunError):
        raise
    except FileNotFoundError:
        raise UsageError(f"{place}: nothing is there; check the address") from None
    except Exception as error:  # each kind of storage has errors of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"{place}: cannot be reached ({reason}); check the address and your credentials") from None


def _resolved(place: str) -> tuple[Any, str]:
    protocol = place.partition("://")[0].rpartition("::")[2]
    if protocol not in fsspec.available_protocols():
        raise UsageError(f"{place}: no storage is called {protocol}; use s3://, gs://, hf:// or https://")
    try:
        return fsspec.core.url_to_fs(place)
    except ImportError as error:
        raise UsageError(f"{place}: a package is missing ({error}); pip install 'vlm[remote]'") from None


def fetched(place: str, sha256: str | None = None) -> Path:
    """A local copy of a far file, fetched once by all processes of a machine. Without `sha256`, a changed file is another.

    Raises UsageError where the bytes are not those that `sha256` promises; they are not kept.
    """
    copy = cache_folder() / "shards" / f"{sha256 or _version(place)}{Path(place).suffix}"
    if not _is_kept(copy, sha256):
        with room_for(copy), _alone(copy):
            if not _is_kept(copy, sha256):
                _fetch(place, copy, sha256)
    return copy


def _version(place: str) -> str:
    """A name for what lies at an address now."""
    with reached(place) as (filesystem, path):
        info = filesystem.info(path)
        # For http, ukey is nothing but the address.
        seen = [info.get(field) for field in ("size", "ETag", "Last-Modified")]
        return _hash(f"{place} {filesystem.ukey(path)} {seen}")


def _is_kept(copy: Path, sha256: str | None) -> bool:
    """Whether the copy is there, and still the bytes that were fetched: a damaged one is fetched anew."""
    return copy.is_file() and (sha256 is None or _digest(copy, sha256) == sha256)


@contextmanager
def _alone(copy: Path) -> Iterator[None]:
    """No other process of this machine fetches the same file meanwhile."""
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        lock = open(copy.with_suffix(".lock"), "w")
    except OSError as error:
        raise UsageError(f"{copy.parent}: can not be written ({error.strerror}); set VLM_CACHE to another") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch(place: str, copy: Path, sha256: str | None) -> None:
    with tempfile.TemporaryDirectory(prefix=".", dir=copy.parent) as folder:
        arrived = Path(folder, copy.name)
        with reached(place) as (filesystem, path), room_for(copy):
            filesystem.get_file(path, str(arrived))
        digest = _digest(arrived)
        if sha256 not in (None, digest):
            raise UsageError(f"{place}: {changed(digest, str(sha256))}")
        os.replace(arrived, copy)
    _note(copy, digest)


def verify(path: Path, sha256: str) -> None:
    """Raise UsageError unless the file's bytes are those that `sha256` promises.

    A file is read once: that it was found right is noted in the cache, with its size and the time of its last change.
    """
    digest = _digest(path, sha256)
    if digest != sha256:
        raise UsageError(f"{path}: {changed(digest, sha256)}")


def changed(found: str, promised: str) -> str:
    """What to say of a file whose bytes are not those that its index lists."""
    return f"sha256 {found[:12]}…, the index says {promised[:12]}…; bytes have changed, copy or convert it again"


def _digest(path: Path, promised: str | None = None) -> str:
    """The file's sha256; not read for it where a note says that it is the promised one."""
    note, state = _noted(path, promised or "")
    with suppress(OSError):
        if promised is not None and note.read_text("utf-8") == state:
            return promised
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest == promised:
        _note(path, digest)
    return digest


def _note(path: Path, digest: str) -> None:
    note, state = _noted(path, digest)
    with suppress(OSError):  # a cache that cannot be written costs time only, and so does a note half-written
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(state, "utf-8")


def _noted(path: Path, digest: str) -> tuple[Path, str]:
    """Where it is noted that a file was found right, and what the note then says."""
    stat = path.stat()
    return cache_folder() / "verified" / _hash(path.absolute()), f"{digest} {stat.st_size} {stat.st_mtime_ns}"


def _hash(text: str | os.PathLike) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()
