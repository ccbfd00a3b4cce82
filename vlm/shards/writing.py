"""Samples into tars, and tars into a folder that appears whole.

Knows what a key may be and how a shard's bytes get to the disk. Knows nothing of what a part holds.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from vlm.errors import UsageError
from vlm.files import atomic_folder, start_storing, write_blocks

from .index import SHARD_NAME, write_index
from .tar import BLOCK, tar_header

AT_ONCE = 1 << 20  # bytes that one call writes: the fewer calls, the less each costs
STORED_AT_ONCE = 1 << 23  # bytes that the disk is told to begin with
COPIED = 1 << 14  # bytes up to which a block is copied beside its neighbours
_ZEROS = bytes(BLOCK)


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
        self._waiting: list[bytes] = []  # hashed
        self._small: list[bytes] = []  # after those, and not hashed yet
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
            self._join()
            self._hold(block)
        else:
            self._small.append(block)

    def _join(self) -> None:
        """The small blocks become one that waits."""
        self._hold(b"".join(self._small))
        self._small = []

    def _hold(self, block: bytes) -> None:
        """Hash a block, which is quicker while it is fresh in the processor's cache, and keep it to be written."""
        self._digest.update(block)
        self._waiting.append(block)

    def _flush(self) -> None:
        """Write what waits."""
        self._join()
        write_blocks(self._file, self._waiting)
        self._waiting, self._written = [], self.bytes
        if self._written - self._stored >= STORED_AT_ONCE:
            start_storing(self._file, self._stored, self._written)
            self._stored = self._written


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
