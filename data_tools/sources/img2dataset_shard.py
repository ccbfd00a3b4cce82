"""One shard of a crawl, its files in groups of one key.

Knows names and where each file's bytes lie, in a tar or in a folder. Knows nothing of what is in them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Protocol

from vlm.errors import UsageError
from vlm.shards import members as members_of_tar

_TEXTS = ("txt", "json")


class Read(Protocol):
    """Gives the bytes of a file."""

    def __call__(self) -> bytes: ...


@dataclass(frozen=True)
class Part:
    """One file of a group: its extension in small letters, its size in bytes, and how to read it."""

    extension: str
    size: int
    read: Read


@dataclass
class Group:
    """Neighbouring files of one key, which is all of the name before its last dot. seen: there was another group of it."""

    key: str
    seen: bool
    parts: list[Part] = field(default_factory=list)


class ShardReader:
    """The groups of a shard, and what was found on the way to its end.

    whole: how many groups there were. last: the key of the last. damage: why the end could not be reached. A link or a
    device is nothing that a group is made of.
    """

    def __init__(self, path: Path, pictures: Sequence[str]) -> None:
        self.path, self.pictures = path, pictures
        self.whole, self.passed_over = 0, 0
        self.last: str | None = None
        self.first_passed_over: str | None = None
        self.damage: str | None = None

    def groups(self) -> Iterator[Group]:
        """Every group, each once its last file is known to be that.

        Of a damaged tar, that is: the group after it has begun, or it holds a picture, .txt and .json, which is all that
        one ever does.
        """
        with ExitStack() as stack:
            yield from self._groups(self._in_folder() if self.path.is_dir() else self._in_tar(stack))

    def _groups(self, members: Iterator[tuple[str, int, Read]]) -> Iterator[Group]:
        group: Group | None = None
        seen: set[str] = set()
        try:
            for name, size, read in members:
                key, extension = _split(name)
                if extension not in (*self.pictures, *_TEXTS):
                    self._pass_over(name)
                    continue
                if group is None or key != group.key:
                    yield from self._ended(group)
                    group = Group(key, key in seen)
                    seen.add(key)
                group.parts.append(Part(extension, size, read))
        except UsageError as error:
            self.damage = str(error).rpartition("; ")[0]
        if self.damage is None or (group is not None and self._is_all(group)):
            yield from self._ended(group)

    def _ended(self, group: Group | None) -> Iterator[Group]:
        if group is not None:
            self.whole += 1
            self.last = group.key
            yield group

    def _is_all(self, group: Group) -> bool:
        extensions = {part.extension for part in group.parts}
        return extensions.issuperset(_TEXTS) and not extensions.isdisjoint(self.pictures)

    def _pass_over(self, name: str) -> None:
        self.passed_over += 1
        self.first_passed_over = self.first_passed_over or name

    def _in_tar(self, stack: ExitStack) -> Iterator[tuple[str, int, Read]]:
        """The file stays open as long as the stack: the last group is read when all members have passed."""
        try:
            file = stack.enter_context(open(self.path, "rb"))
        except OSError as error:
            raise UsageError(f"{self.path}: {error.strerror}; check its permissions") from None
        for _, name, offset, size in members_of_tar(self.path):
            yield name.removeprefix("./"), size, partial(_read_at, self.path, file, offset, size)

    def _in_folder(self) -> Iterator[tuple[str, int, Read]]:
        """A shard's folder is as long as the shard, so its names may be sorted in memory."""
        try:
            with os.scandir(self.path) as entries:
                found = sorted((entry.name, entry) for entry in entries)
        except OSError as error:
            raise UsageError(f"{self.path}: {error.strerror}; check its permissions") from None
        for name, entry in found:
            if entry.is_file(follow_symlinks=False):
                yield name, entry.stat(follow_symlinks=False).st_size, partial(_read, Path(entry.path))


def _split(name: str) -> tuple[str, str]:
    """`a/00017.jpg` -> `a/00017`, `jpg`; no extension where there is no dot."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.rpartition(".")
    return (folder + slash + stem, extension.lower()) if dot else (name, "")


def _read_at(path: Path, file: IO[bytes], offset: int, size: int) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise UsageError(f"{path}: shorter than when it was opened; leave it alone meanwhile")
    return data


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: can not be read ({error.strerror}); check its permissions") from None
