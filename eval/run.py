"""`vlm eval`: puts tasks to a model on held-out shards and writes what came of it.

Knows splits, the ways of looking (true, blind, shuffled) and result files. Knows nothing of how a task asks or scores.

Blind and shuffled say how much of a score comes from the picture: a model that answers as well without it, or with a
picture of something else, has learnt the questions and not to see.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from vlm.api import load
from vlm.errors import UsageError
from vlm.files import atomic_write
from vlm.machine import environment, peak_memory_gib
from vlm.shards import INDEX, Shards

from . import pictures
from .tasks import TASKS, Item, Scored, Task

MAIN, MORE = "test", "test-*"
TRUE = "true"


@dataclass(frozen=True)
class Outcome:
    """One task on one split: its items and, per way of looking, what came back."""

    name: str
    items: list[Item]
    looks: dict[str, Scored]
    seconds: float

    def metrics(self) -> dict[str, Any]:
        """The task's entry in results.json: its own metrics, `n`, and those of the other looks beneath their names."""
        others = {name: scored.metrics for name, scored in self.looks.items() if name != TRUE}
        return self.looks[TRUE].metrics | {"n": len(self.items)} | others

    def lines(self) -> Iterable[dict[str, Any]]:
        """One line an item for samples.jsonl."""
        true = self.looks[TRUE]
        for place, item in enumerate(self.items):
            line: dict[str, Any] = {"task": self.name, "id": item.id, "key": item.key}
            line |= {"type": item.type} if item.type else {}
            line |= {"prompt": item.prompt} if item.prompt else {}
            line |= {"prediction": true.predictions[place], "references": item.references, "score": true.scores[place]}
            for name, scored in self.looks.items():
                if name != TRUE:
                    line[name] = {"prediction": scored.predictions[place], "score": scored.scores[place]}
            yield line


def evaluate(
    model: Any,
    tasks: Sequence[str],
    data: str | Path,
    out: str | Path | None = None,
    batch: int = 64,
    limit: int | None = None,
    blind: bool = True,
    shuffled: bool = True,
) -> dict[str, Any]:
    """Score `model` (what `vlm.load` returns, or a path) on `tasks` and return what results.json holds.

    data: a folder of shards, or one that holds `test` and perhaps `test-…` beside it; a task on such another split is
    called TASK@SPLIT, and runs where the split holds something for it. limit: the first so many samples of each split.
    out: a folder for results.json, samples.jsonl and the official result files; results.json is written last.
    Raises UsageError for an unknown task, for data that holds nothing for a task, and for what the model can not do.
    """
    wanted = [_task(name) for name in dict.fromkeys(tasks)]
    if not wanted:
        raise UsageError(f"no task is given; choose some of {', '.join(TASKS)}")
    for name, value in (("batch", batch), ("limit", limit)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; it must be at least 1")
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise UsageError(f"{out}: a file is there already; give another folder for the results")
    splits = find_splits(Path(data))
    named = str(model) if isinstance(model, str | Path) else getattr(model.model, "name_or_path", "") or "in memory"
    loaded = load(model) if isinstance(model, str | Path) else model

    outcomes = []
    for split, folder in splits.items():
        shards = Shards.open(folder)
        samples = shards.first(limit)
        looks = _looks(samples, loaded, blind, shuffled)
        for task in wanted:
            items = task.items(samples, loaded.processor.caption_prompt)
            if items:
                name = f"{task.name}@{split}" if split else task.name
                outcomes.append(_run(task, name, items, looks, loaded, batch))
            elif not split:
                raise UsageError(
                    f"{folder}: no {task.needs} for task {task.name}; give other data or leave the task out"
                )
    results = _results(named, loaded, splits, outcomes, limit)
    if out is not None:
        _write(Path(out), results, outcomes)
    return results


def find_splits(data: Path) -> dict[str, Path]:
    """Split name -> folder or tar; the main one is called "". Raises UsageError where there is nothing to evaluate."""
    if not data.is_dir() or (data / INDEX).exists():
        return {"": data}
    if (data / MAIN).is_dir():
        more = sorted(path for path in data.glob(MORE) if path.is_dir())
        return {"": data / MAIN} | {path.name: path for path in more}
    found = sorted(path.parent.name for path in data.glob(f"*/{INDEX}"))
    mend = f"name one of them: {', '.join(found)}" if found else "make some with `vlm data convert`"
    raise UsageError(f"{data}: neither {INDEX} nor a folder {MAIN} is in it; {mend}")


def _task(name: str) -> Task:
    if name not in TASKS:
        raise UsageError(f"task {name!r} is unknown; choose of {', '.join(TASKS)}")
    return TASKS[name]


def _looks(samples: Shards, model: Any, with_blind: bool, with_shuffled: bool) -> list[pictures.Look]:
    looks = [pictures.as_it_is(samples)]
    if with_blind:
        looks.append(pictures.blind(samples, pictures.zero_colour(model.processor)))
    if with_shuffled:
        looks.append(pictures.shuffled(samples))
    return looks


def _run(task: Task, name: str, items: list[Item], looks: list[pictures.Look], model: Any, batch: int) -> Outcome:
    start = time.monotonic()
    scored = {}
    for look in looks:
        label = name if look.name == TRUE else f"{name}, {look.name}"
        outputs = task.ask(model, items, look, batch, partial(_progress, label))
        scored[look.name] = task.score(items, outputs)
    return Outcome(name, items, scored, time.monotonic() - start)


def _progress(label: str, parts: Sequence[Any]) -> Iterable[Any]:
    console = Console(stderr=True)
    return track(parts, description=label, console=console, disable=not console.is_terminal, transient=True)


def _results(
    named: str, model: Any, splits: dict[str, Path], outcomes: list[Outcome], limit: int | None
) -> dict[str, Any]:
    seconds = {outcome.name: round(outcome.seconds, 2) for outcome in outcomes}
    measured = {"seconds": seconds, "peak_memory_gib": peak_memory_gib(), "finished": datetime.now(UTC).isoformat()}
    return {
        "model": named,
        "data": {split or "main": str(folder.resolve()) for split, folder in splits.items()},
        "limit": limit,
        "blind_colour": pictures.zero_colour(model.processor),
        "tasks": {outcome.name: outcome.metrics() for outcome in outcomes},
        "gates": {key: list(pair) for key, pair in model.model.gates().items()},
        "parameters": sum(parameter.numel() for parameter in model.model.parameters()),
        "environment": environment() | measured,
    }


def _write(out: Path, results: dict[str, Any], outcomes: list[Outcome]) -> None:
    (out / "results.json").unlink(missing_ok=True)  # what stands beside another run's numbers must not look like theirs
    with atomic_write(out / "samples.jsonl", "w") as file:
        for outcome in outcomes:
            for line in outcome.lines():
                file.write(json.dumps(_plain(line), ensure_ascii=False) + "\n")
    for outcome in outcomes:
        official = outcome.looks[TRUE].official
        if official:
            with atomic_write(out / f"{outcome.name}_results.json", "w") as file:
                json.dump(official, file, ensure_ascii=False)
    with atomic_write(out / "results.json", "w") as file:
        json.dump(_plain(results), file, indent=2, ensure_ascii=False)
        file.write("\n")


def _plain(value: Any) -> Any:
    """Infinity and NaN, which JSON has no words for, as strings; everything else as it is."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def summary(results: dict[str, Any]) -> str:
    """A few lines for the terminal: each task's headline number with the blind and shuffled ones beside it."""
    lines = []
    for name, metrics in results["tasks"].items():
        headline = TASKS[name.partition("@")[0]].headline
        cells = [f"{name}: {headline} {_shown(metrics[headline])}"]
        cells += [f"{look} {_shown(metrics[look][headline])}" for look in ("blind", "shuffled") if look in metrics]
        lines.append("  ".join([*cells, f"(n = {metrics['n']})"]))
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
