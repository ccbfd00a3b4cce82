"""Rows of a benchmark: ours beside a peer, measured in one run. Knows how they are shown and stored; nothing of what ran."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.table import Table

from vlm.errors import RunError
from vlm.files import atomic_write
from vlm.machine import environment


@dataclass(frozen=True)
class Row:
    """One measurement. `ratio` is ours / peer where more is better, and peer / ours where less is; `target` is for it.

    peer is None, and ratio too, for what is measured against a bound alone, such as memory.
    """

    name: str
    ours: float
    peer: float | None
    unit: str
    conditions: str
    target: str = ""
    less_is_better: bool = False

    @property
    def ratio(self) -> float | None:
        """Above 1: ours is ahead."""
        if not self.peer or not self.ours:
            return None
        return self.peer / self.ours if self.less_is_better else self.ours / self.peer


def interleaved(ours: Callable[[], float], peer: Callable[[], float], rounds: int) -> tuple[float, float]:
    """The medians of two measurements taken in turns, so that a noisy machine is noisy for both."""
    pairs = [(ours(), peer()) for _ in range(rounds)]
    return median(pair[0] for pair in pairs), median(pair[1] for pair in pairs)


def seconds(work: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_mb(module: str, *arguments: str) -> float:
    """The most memory in MB that one process of `python -m module …` held. Raises RunError where it failed."""
    child = subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise RunError(f"{module} {' '.join(arguments)} failed with status {child.returncode}")
    return usage.ru_maxrss / 1024


def table(rows: Sequence[Row]) -> Table:
    """The rows for a person to read."""
    shown = Table("", "ours", "peer", "ratio", "target", "conditions", show_lines=True)
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        peer = "" if row.peer is None else f"{row.peer:,.4g}"
        shown.add_row(row.name, f"{row.ours:,.4g} {row.unit}", peer, ratio, row.target, row.conditions)
    return shown


def write_rows(rows: Sequence[Row], out: str | Path) -> None:
    """Write `{"machine": …, "rows": [{"name", "ours", "peer", "ratio", "unit", "conditions", …}]}`."""
    told = [{**asdict(row), "ratio": row.ratio} for row in rows]
    with atomic_write(out, "w") as file:
        json.dump({"machine": environment(), "rows": told}, file, indent=1)
        file.write("\n")
