"""Tables on disk for what a source must join or sort and memory may not hold.

Knows SQLite. Knows nothing of any format.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from .base import Skipped

# Nothing of a table is worth more than the run that fills it, so nothing is done to save it from a crash.
_SETTINGS = """
PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA locking_mode = EXCLUSIVE; PRAGMA cache_size = -32768;
CREATE TABLE skipped (number INTEGER PRIMARY KEY, reason);
"""


class Tables:
    """Empty tables of a schema in `folder`, in the place of those of an earlier run; a context manager."""

    def __init__(self, folder: Path, schema: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "tables.sqlite"
        path.unlink(missing_ok=True)
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.executescript(_SETTINGS + schema)
        self._connection.execute("BEGIN")

    def __enter__(self) -> Tables:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def execute(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        """What SQLite gives for a statement; a full disk is an OSError as it is everywhere else."""
        try:
            return self._connection.execute(statement, values)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
            raise

    def put(self, statement: str, values: Sequence[Any]) -> bool:
        """Whether an `INSERT OR IGNORE` put something in."""
        return self.execute(statement, values).rowcount > 0

    def skip(self, reason: str) -> None:
        """Keep for later what can not be used."""
        self.execute("INSERT INTO skipped (reason) VALUES (?)", (reason,))

    def skipped(self) -> Iterator[Skipped]:
        """What was kept, in order."""
        return (Skipped(reason) for (reason,) in self.execute("SELECT reason FROM skipped ORDER BY number"))
