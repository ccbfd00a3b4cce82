"""What img2dataset tells of a shard beside it: NNNNN_stats.json, and NNNNN.parquet with a line for each address.

Knows those two files. Knows nothing of the shard itself.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vlm.errors import UsageError

_SUCCESS = "success"


@dataclass(frozen=True)
class Counts:
    """Addresses of a shard, those that were downloaded, and why others were not, the most frequent reasons first."""

    total: int
    successes: int
    reasons: tuple[tuple[str, int], ...] = ()

    @property
    def failed(self) -> int:
        """Addresses that were not downloaded."""
        return self.total - self.successes


class Told:
    """The files beside shard `name`; either may be missing."""

    def __init__(self, folder: Path, name: str) -> None:
        self.stats, self.parquet = folder / f"{name}_stats.json", folder / f"{name}.parquet"
        self.source = self.stats.name

    def counts(self) -> Counts | None:
        """How many addresses were downloaded, by the first of the files that tells it; None where none does."""
        return self.stated() or self._listed()

    def stated(self) -> Counts | None:
        """What the small file says, None where it is not there or says nothing."""
        try:
            stats = json.loads(self.stats.read_bytes())
            return _counts(stats["count"], stats["successes"], stats.get("status_dict") or {})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def _listed(self) -> Counts | None:
        try:
            statuses = Counter(line["status"] for line in self._lines("status"))
        except UsageError:
            return None
        self.source = self.parquet.name
        return _counts(statuses.total(), statuses[_SUCCESS], statuses) if statuses else None

    def caption(self, key: str) -> str | None:
        """The caption of a key in the parquet file. Raises UsageError where that is there and can not be read."""
        return self._captions.get(key)

    @cached_property
    def _captions(self) -> dict[str, str]:
        """Of one shard, which is small beside its pictures; a key that comes twice has none."""
        captions: dict[str, str] = {}
        twice = set()
        for line in self._lines("key", "caption"):
            key, caption = line["key"], line["caption"]
            if key in captions:
                twice.add(key)
            if isinstance(caption, str) and caption.strip():
                captions[str(key)] = caption.strip()
        return {key: caption for key, caption in captions.items() if key not in twice}

    def _lines(self, *columns: str) -> Iterator[dict[str, Any]]:
        """The lines of the parquet file; none where it or one of the columns is not there."""
        if not self.parquet.is_file():
            return
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UsageError(f"{self.parquet}: pyarrow is needed to read it; pip install 'vlm[parquet]'") from None
        try:
            with pyarrow.parquet.ParquetFile(self.parquet) as file:
                if set(columns) <= set(file.schema_arrow.names):
                    for batch in file.iter_batches(columns=list(columns)):
                        yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"{self.parquet}: can not be read ({reason}); download it again") from None


def _counts(total: Any, successes: Any, statuses: dict[str, int]) -> Counts | None:
    if not isinstance(total, int) or not isinstance(successes, int):
        return None
    failures = Counter({str(reason): count for reason, count in statuses.items() if reason != _SUCCESS})
    return Counts(total, successes, tuple(failures.most_common(3)))
