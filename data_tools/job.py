"""A long piece of work in small ones: each makes its own files, whole, in any order, and none is done twice.

Knows pieces, their results, where unfinished output waits and how it becomes whole. Knows nothing of what a piece does
or of who does it.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

from vlm.errors import UsageError
from vlm.files import room_for
from vlm.shards import INDEX, SHARD_NAME, ShardFileWriter
from vlm.storage import Folder, is_address, join

from .progress import watched

STATE = ".job"  # the folder, within the unfinished output, of what is known of the pieces
SETTINGS = "settings.json"
LOCK = "lock"
ENDING = 2  # seconds within which the workers of a killed process are gone

Work = Callable[[Folder, int, Any], dict[str, Any]]


class Engine(Protocol):
    """Who does the pieces: processes of this machine, or a cluster."""

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Generator[Any, None, None]:
        """The results of `function` in the order of `items`, of which only a few are taken ahead.

        Closed early, nothing is worked on any more when that returns.
        """


class Job:
    """Unfinished output that goes on where an earlier run of the same settings stopped."""

    def __init__(self, folder: Folder, engine: Engine, stack: ExitStack) -> None:
        self.folder, self.engine, self._stack = folder, engine, stack

    def run(self, step: str, work: Work, pieces: Iterable[Any], total: int | None = None) -> Iterator[dict[str, Any]]:
        """The result of `work(folder, number, piece)` for each piece, in order; those found done are not done again.

        `work` is a function of a module, or a partial of one, and returns JSON values; it writes whole files whose names
        and bytes follow from its arguments. total: samples of all pieces, for the progress bar, which counts the values
        under `samples` and `skipped`; None: not known.
        """
        results = self.engine.map(partial(_piece, work, self.folder, step), enumerate(pieces))
        return watched(self._stack.enter_context(closing(results)), step, total)

    def forget(self, *steps: str) -> None:
        """Have every piece of some steps done again."""
        states = Folder(join(self.folder.place, STATE))
        for name in states.names():
            if name.rpartition("-")[0] in steps:
                states.remove(name)

    def scratch(self, name: str) -> Folder:
        """A folder for what is needed until the job is done."""
        return Folder(join(self.folder.place, f"{STATE}/{name}"))


def _piece(work: Work, folder: Folder, step: str, numbered: tuple[int, Any]) -> dict[str, Any]:
    number, piece = numbered
    states, name = Folder(join(folder.place, STATE)), f"{step}-{number:05d}.json"
    done = states.read(name)
    if done is not None:
        return json.loads(done)
    result = work(folder, number, piece)
    with states.write(name) as file:
        file.write(json.dumps(result).encode())
    return result


@contextmanager
def job(out: str | Path, settings: Mapping[str, Any], engine: Engine) -> Iterator[Job]:
    """Yield a job whose folder becomes `out` when the block ends well.

    A kill or a RunError leaves what was done, hidden beside `out` (at an address: in it, without an index), and the same
    settings go on from there. What a UsageError or a full disk ends leaves nothing. Raises UsageError if something stands
    at `out` already, nothing can be written there, or another process of a machine that locks files is at it; an address
    can not be locked.
    """
    with room_for(out), ExitStack() as stack:
        try:
            folder = _begin(out, json.dumps(settings, sort_keys=True).encode(), stack)
        except OSError as error:
            if isinstance(error, FileExistsError | NotADirectoryError | PermissionError):
                raise UsageError(f"{out}: can not be written ({error.strerror}); choose another folder") from None
            raise
        try:
            with ExitStack() as working:  # whatever ends the block, nobody writes any more when it has ended
                yield Job(folder, engine, working)
            _finish(out, folder)
        except (UsageError, OSError):
            folder.remove()
            raise


def _begin(out: str | Path, settings: bytes, stack: ExitStack) -> Folder:
    """The folder of the unfinished output: an earlier one where it was made with the same settings, else a fresh one."""
    folder, found = _begin_far(str(out), settings) if is_address(out) else _begin_near(str(out), settings, stack)
    if found != settings:
        with Folder(join(folder.place, STATE)).write(SETTINGS) as file:
            file.write(settings)
    return folder


def _begin_near(out: str, settings: bytes, stack: ExitStack) -> tuple[Folder, bytes | None]:
    path = Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise _taken(out)
    folder = path.parent / f".{path.name}.partial"
    state = folder / STATE
    state.mkdir(parents=True, exist_ok=True)
    _lock(out, stack.enter_context(open(state / LOCK, "ab")))
    found = Folder(state).read(SETTINGS)
    if found != settings:
        # All but the lock; the settings first, so that a kill leaves nothing that seems to be theirs.
        (state / SETTINGS).unlink(missing_ok=True)
        for entry in [*folder.iterdir(), *state.iterdir()]:
            if entry.name not in (STATE, LOCK):
                Folder(folder).remove(str(entry.relative_to(folder)))
    return Folder(folder), found


def _lock(out: str, lock: IO[bytes]) -> None:
    """Nobody else works at the same output until `lock` is closed. Workers of a process that was killed may end first."""
    end = time.monotonic() + ENDING
    while not _locked(lock):
        if time.monotonic() > end:
            raise UsageError(f"{out}: another process is writing it; wait for it or choose another folder")
        time.sleep(0.05)


def _locked(lock: IO[bytes]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The one who had it may have been done in between, and the file be gone or another's.
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name))
    except OSError:
        return False


def _begin_far(out: str, settings: bytes) -> tuple[Folder, bytes | None]:
    folder = Folder(out)
    found, names = Folder(join(out, STATE)).read(SETTINGS), folder.names()
    # What has no settings beside it is somebody's data, and is never removed.
    if names and found is None or INDEX in names and found != settings:
        raise _taken(out)
    if found not in (None, settings):
        folder.remove()
    return folder, found


def _taken(out: str) -> UsageError:
    return UsageError(f"{out}: already there; choose another folder or remove it")


def _finish(out: str | Path, folder: Folder) -> None:
    folder.remove(STATE)
    if not is_address(out):
        for begun in Path(folder.place).rglob(".*"):  # files that somebody was killed in the middle of
            begun.unlink()
        os.replace(folder.place, out)


class PieceWriter:
    """Writes the samples of one piece into a shard of its number, and into more of them where it grows too large.

    A context manager; each shard appears whole. `shards` are their lines of the index, once the block has ended.
    """

    def __init__(self, folder: Folder, number: int, most_bytes: int | None = None) -> None:
        self.folder, self.number, self.most_bytes = folder, number, most_bytes
        self.shards: list[dict[str, Any]] = []
        self._stack = ExitStack()
        self._shard: ShardFileWriter | None = None
        self._keys: set[str] = set()

    def __enter__(self) -> PieceWriter:
        return self

    def write(self, key: str, parts: Mapping[str, bytes]) -> None:
        """Add one sample. Raises UsageError for a key that is empty, has dots, or was written before."""
        if key in self._keys:
            raise UsageError(f"key {key!r} comes twice; give every sample its own")
        if self._shard is not None and self.most_bytes is not None and self._shard.size_with(parts) > self.most_bytes:
            self._close()
        if self._shard is None:
            self._shard = ShardFileWriter(*self._open())
        self._shard.write(key, parts)
        self._keys.add(key)

    def _open(self) -> tuple[IO[bytes], str]:
        name = SHARD_NAME.format(self.number)
        if self.shards:
            name = name.replace(".tar", f"-{len(self.shards)}.tar")
        return self._stack.enter_context(self.folder.write(name)), name

    def _close(self) -> None:
        if self._shard is not None:
            self.shards.append(self._shard.close())
            self._stack.close()
            self._shard = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._close()
        elif self._stack.__exit__(kind, error, trace):
            raise error
