"""What a run leaves to be read: `log.jsonl`, curves, and a progress bar for whoever watches.

Knows files and terminals. Knows nothing of models, data, what the numbers mean or who draws the curves.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vlm.files import room_for

from .boards import Board, open_boards
from .config import Log as LogSettings

PLAIN_SECONDS = 10.0
TENSORBOARD_ALONE = LogSettings()


class RunLog:
    """The log of one run; a context manager. On ranks other than the main one it does nothing.

    out: the run's folder. main: whether this rank writes. append: go on with the log that is there (a resumed run).
    boards: where curves are drawn beside TensorBoard.
    """

    def __init__(self, out: Path, main: bool, append: bool = False, boards: LogSettings = TENSORBOARD_ALONE) -> None:
        self._file: IO[str] | None = None
        self._progress: Progress | None = None
        self._tasks: dict[int, TaskID] = {}
        self._last_plain = -math.inf
        self._out, self._main, self._append = out, main, append
        self._wanted = boards
        self._boards: list[Board] = []

    def __enter__(self) -> RunLog:
        if not self._main:
            return self
        self._out.mkdir(parents=True, exist_ok=True)
        self._path = self._out / "log.jsonl"
        if self._append:
            _drop_half_line(self._path)
        self._file = open(self._path, "a" if self._append else "w", encoding="utf-8")
        self._boards = open_boards(self._wanted, self._out, self._append)
        self._console = Console(file=sys.stdout)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self, *, progress: float | None = None, **fields: Any) -> None:
        """One optimizer step: a line of `fields`, floats in full. progress: share of the stage that is done, 0 to 1."""
        if self._file is None:
            return
        self._write(fields)
        stage, step = fields.get("stage", 0), fields.get("step", 0)
        told = {name: value for name, value in fields.items() if name not in ("stage", "step")}
        self._draw(stage, step, dict(_scalars(told)))
        self._show(stage, progress, f"step {step}  {_shown(fields)}")

    def validation(self, *, stage: int, step: int, **fields: Any) -> None:
        """What held-out data said: an event, and curves."""
        self.event("validation", stage=stage, step=step, **fields)
        told = {name: value for name, value in fields.items() if name not in ("seconds", "samples", "asked")}
        self._draw(stage, step, dict(_scalars(told, "validation/")))

    def event(self, name: str, **fields: Any) -> None:
        """Something that happened: a line with an "event" field."""
        if self._file is None:
            return
        self._write({"event": name, **fields})

    def say(self, text: str) -> None:
        """A line for whoever watches."""
        if self._file is None:
            return
        (self._progress.console if self._progress else self._console).print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Finish the files and the bar; calling it again does nothing."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._file is not None:
            file, self._file = self._file, None
            with room_for(self._path):
                try:
                    file.close()
                finally:
                    while self._boards:
                        self._boards.pop().close()

    def _draw(self, stage: int, step: int, values: dict[str, float]) -> None:
        for board in self._boards:
            board.add(stage, step, values)

    def _write(self, fields: dict[str, Any]) -> None:
        assert self._file is not None
        with room_for(self._path):
            self._file.write(json.dumps(_plain(fields), ensure_ascii=False) + "\n")
            self._file.flush()

    def _show(self, stage: int, progress: float | None, text: str) -> None:
        if self._console.is_terminal:
            bar = self._bar(stage)
            bar.update(self._tasks[stage], completed=progress, description=f"stage {stage}", text=text)
        elif time.monotonic() - self._last_plain >= PLAIN_SECONDS or progress == 1.0:
            self._last_plain = time.monotonic()
            share = "" if progress is None else f" {progress:4.0%}"
            print(f"stage {stage}{share}  {text}", flush=True)

    def _bar(self, stage: int) -> Progress:
        if self._progress is None:
            columns = (
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("·"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._progress = Progress(TextColumn("{task.description}"), *columns, console=self._console)
            self._progress.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(f"stage {stage}", total=1.0, text="")
        return self._progress


def _scalars(fields: dict[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested fields, each by its path: {"a": {"b": 1}} is a/b."""
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{above}{name}/")
        elif isinstance(value, (int, float)):
            yield above + name, value


def _drop_half_line(path: Path) -> None:
    """Cut off what a kill left of a last line, so that the next one stands on its own."""
    if path.is_file():
        written = path.read_bytes()
        if not written.endswith(b"\n"):
            os.truncate(path, written.rfind(b"\n") + 1)


def _shown(fields: dict[str, Any]) -> str:
    parts = [f"{name} {fields[name]:.4g}" for name in ("loss", "lr") if isinstance(fields.get(name), float)]
    if isinstance(fields.get("samples_per_second"), (int, float)):
        parts.append(f"{fields['samples_per_second']:.0f} samples/s")
    return "  ".join(parts)


def _plain(value: Any) -> Any:
    """Plain JSON: NaN and infinity, which JSON has no words for, as the strings "nan", "inf" and "-inf"."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if hasattr(value, "item") and not isinstance(value, (int, float, str, bool)):
        return _plain(value.item())
    return value
