"""A long piece of work in small ones: each makes its own files, whole, in any order, and none is done twice.

Knows pieces, their results, where unfinished output waits and how it becomes whole. Knows nothing of what a piece does
or of who does it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

from vlm.errors import RunError, UsageError
from vlm.files import room_for
from vlm.shards import INDEX, SHARD_NAME, ShardFileWriter
from vlm.storage import Folder, is_address, join

from .progress import watched

STATE = ".job"  # the folder, within the unfinished output, of what is known of the pieces
SETTINGS = "settings.json"

Work = Callable[[Folder, int, Any], dict[str, Any]]


class Engine(Protocol):
    """Who does the pieces: processes of this machine, or a cluster."""

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """The results of `function` in the order of `items`, of which only a few are taken ahead."""


class Job:
    """Unfinished output that goes on where an earlier run of the same settings stopped."""

    def __init__(self, folder: Folder, engine: Engine) -> None:
        self.folder, self.engine = folder, engine

    def run(self, step: str, work: Work, pieces: Iterable[Any], total: int | None = None) -> Iterator[dict[str, Any]]:
        """The result of `work(folder, number, piece)` for each piece, in order; those found done are not done again.

        `work` is a function of a module, or a partial of one, and returns JSON values; it writes whole files whose names
        and bytes follow from its arguments. total: samples of all pieces, for the progress bar, which counts the values
        under `samples` and `skipped`; None: not known.
        """
        return watched(self.engine.map(partial(_piece, work, self.folder, step), enumerate(pieces)), step, total)

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

    A kill leaves what was done, hidden beside `out` (at an address: in it, without an index), and the same settings go on
    from there. What a UsageError or RunError ends leaves nothing. Raises UsageError if something stands at `out` already,
    nothing can be written there, or another process is at it.
    """
    with room_for(out):
        try:
            folder = _begin(out, settings)
        except OSError as error:
            if isinstance(error, FileExistsError | NotADirectoryError | PermissionError):
                raise UsageError(f"{out}: can not be written ({error.strerror}); choose another folder") from None
            raise
        with _alone(out, folder):
            try:
                yield Job(folder, engine)
                _finish(out, folder)
            except (UsageError, RunError, OSError):
                folder.remove()
                raise


def _begin(out: str | Path, settings: Mapping[str, Any]) -> Folder:
    """The folder of the unfinished output: an earlier one where it was made with the same settings, else a fresh one."""
    if is_address(out):
        if Folder(out).read(INDEX) is not None:
            raise UsageError(f"{out}: already there; choose another folder or remove it")
        folder = Folder(out)
    else:
        path = Path(out)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UsageError(f"{out}: already there; choose another folder or remove it")
        folder = Folder(path.parent / f".{path.name}.partial")
    state = Folder(join(folder.place, STATE))
    wanted = json.dumps(settings, sort_keys=True).encode()
    if state.read(SETTINGS) != wanted:
        folder.remove()
        if not is_address(out):
            Path(state.place).mkdir(parents=True)
        with state.write(SETTINGS) as file:
            file.write(wanted)
    return folder


@contextmanager
def _alone(out: str | Path, folder: Folder) -> Iterator[None]:
    """Nobody else on this machine works at the same output meanwhile."""
    if is_address(out):
        yield
        return
    with open(Path(folder.place, STATE, SETTINGS), "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"{out}: another process is writing it; wait for it or choose another folder") from None
        yield


def _finish(out: str | Path, folder: Folder) -> None:
    folder.remove(STATE)
    if not is_address(out):
        for left in Path(folder.place).rglob(".*"):  # of files that a kill interrupted
            left.unlink()
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
