"""Writing files so that what is there is whole. Knows paths and renames; knows nothing of their content."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from vlm.errors import RunError

MOST_BLOCKS = 1024  # of one call, by POSIX
_C = ctypes.CDLL(None)
_BEGIN_WRITING = 2  # SYNC_FILE_RANGE_WRITE of Linux


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that takes the place of `path` when the block ends well, and vanishes when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _named(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with _named(path), os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_blocks(file: IO[bytes], blocks: Sequence[bytes]) -> None:
    """Write blocks, one after the other, in as few calls as it takes; `file` has nothing in its buffer."""
    waiting: list[bytes | memoryview] = list(blocks)
    while waiting:
        written = os.writev(file.fileno(), waiting[:MOST_BLOCKS])
        while waiting and written >= len(waiting[0]):
            written -= len(waiting.pop(0))
        if written:
            waiting[0] = memoryview(waiting[0])[written:]


def start_storing(file: IO[bytes], start: int, stop: int) -> None:
    """Have the disk begin with what was written from `start` to `stop`, so that the fsync in the end has less to wait for.

    Advice alone: where a system has no such call, and where it fails, nothing happens.
    """
    begin = getattr(_C, "sync_file_range", None)
    if begin is not None:
        begin(file.fileno(), ctypes.c_int64(start), ctypes.c_int64(stop - start), _BEGIN_WRITING)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty sibling folder that takes the place of `path` when the block ends well.

    A folder that already stands at `path` is moved aside first and removed last, so a kill leaves the old or the new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _named(path):
        fresh = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.new."))
    try:
        with _named(path):
            yield fresh
        _open_to_others(fresh)
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
            os.replace(path, old / path.name)
            os.replace(fresh, path)
            shutil.rmtree(old)
        else:
            os.replace(fresh, path)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


@contextmanager
def room_for(path: str | Path) -> Iterator[None]:
    """Turn the disk's running full inside the block into a RunError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(f"{path}: no space left on the disk; free some and run it again") from None


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """An error of the disk inside the block names `path`: a failed write names no file, and the others a hidden one."""
    try:
        yield
    except OSError as error:
        hidden = os.path.abspath(path.parent / f".{path.name}.")
        if error.filename is None or os.path.abspath(error.filename).startswith(hidden):
            error.filename = str(path)
        raise


def _open_to_others(folder: Path) -> None:
    """Temporary folders, and the files that safetensors writes, are private; these become as readable as any other."""
    mask = _umask()
    os.chmod(folder, 0o777 & ~mask)
    for path in folder.rglob("*.safetensors"):
        os.chmod(path, 0o666 & ~mask)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
