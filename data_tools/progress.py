"""How far a job is: a bar with samples, rate and time left, on a terminal and nowhere else. Knows nothing of the job."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text


class _Rate(TextColumn):
    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} samples/s" if task.speed else "")


def watched(results: Iterable[dict[str, Any]], title: str, total: int | None = None) -> Iterator[dict[str, Any]]:
    """The results as they come, while a bar on standard error counts their `samples` and `skipped`.

    total: how many there will be; None: not known, and no time left is shown.
    """
    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), "{task.completed:,.0f} samples", _Rate(), TimeElapsedColumn())
    left = () if total is None else ("left", TimeRemainingColumn())
    with Progress(*columns, *left, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(title, total=total)
        for result in results:
            bar.advance(task, result.get("samples", 0) + result.get("skipped", 0))
            yield result
