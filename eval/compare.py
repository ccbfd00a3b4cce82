"""`vlm eval compare`: two evaluations of the same items, and whether they differ by more than chance.

Knows the files that `vlm eval` leaves (results.json, samples.jsonl). Knows nothing of tasks, models or pictures: what is
compared is the score that each item got. Each task is tested on its own; of twenty tasks with nothing between them one
will differ at p < 0.05.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from vlm.errors import UsageError

from .metrics.significance import bootstrap_mean, compare_paired

RESULTS, SAMPLES = "results.json", "samples.jsonl"
NAMED = 3
Key = tuple[str, Any]  # task, id
Lines = dict[Key, dict[str, Any]]


def compare(a: str | Path, b: str | Path) -> dict[str, Any]:
    """What changed from evaluation folder `a` to `b`, task by task.

    `{"a", "b", "models": [of a, of b], "tasks": {TASK: …}}`, and for a task: `n`; `a`, `b` and `difference` (b - a), each
    `{"value", "low", "high"}`, the mean score of its items with its 95 % bootstrap interval; `p` and `test` of
    `metrics.significance`; `up`, `down`, `same`, how many items went which way. A task where some item has no finite
    score of its own has `skipped`, a sentence, instead.
    Raises UsageError for folders without an evaluation, and for two that are not of the same items.
    """
    before, after = _results(Path(a)), _results(Path(b))
    ours, theirs = _samples(Path(a), before), _samples(Path(b), after)
    _refuse_other_items(Path(a), ours, Path(b), theirs)
    tasks: dict[str, list[Key]] = {}
    for key in ours:
        tasks.setdefault(key[0], []).append(key)
    compared = {
        task: _compared([_score(ours[key]) for key in keys], [_score(theirs[key]) for key in keys])
        for task, keys in tasks.items()
    }
    return {"a": str(a), "b": str(b), "models": [before.get("model"), after.get("model")], "tasks": compared}


def summary(compared: Mapping[str, Any]) -> str:
    """A few lines for the terminal, one a task."""
    lines = [f"a  {compared['a']}  {compared['models'][0]}", f"b  {compared['b']}  {compared['models'][1]}"]
    for task, found in compared["tasks"].items():
        if "skipped" in found:
            lines.append(f"{task}: {found['skipped']}")
            continue
        verdict = "p < 0.001" if found["p"] < 0.001 else f"p = {found['p']:.3f}"
        lines.append(
            f"{task}: a {_shown(found['a'])}  b {_shown(found['b'])}  b - a {_shown(found['difference'], '+')}  "
            f"{verdict} ({found['test']})  up {found['up']}, down {found['down']}, same {found['same']} "
            f"(n = {found['n']})"
        )
    return "\n".join(lines)


def _shown(interval: Mapping[str, float], sign: str = "") -> str:
    return f"{interval['value']:{sign}.3f} [{interval['low']:{sign}.3f}, {interval['high']:{sign}.3f}]"


def _compared(before: list[float], after: list[float]) -> dict[str, Any]:
    ours, theirs = np.array(before), np.array(after)
    scoreless = int((~np.isfinite(ours) | ~np.isfinite(theirs)).sum())
    if scoreless:
        return {"n": len(ours), "skipped": f"{scoreless} of {len(ours)} items have no finite score of their own"}
    paired = compare_paired(ours, theirs)
    return {
        "n": len(ours),
        "a": asdict(bootstrap_mean(ours)),
        "b": asdict(bootstrap_mean(theirs)),
        "difference": asdict(paired.difference),
        "p": paired.p,
        "test": paired.test,
        "up": int((theirs > ours).sum()),
        "down": int((theirs < ours).sum()),
        "same": int((theirs == ours).sum()),
    }


def _score(line: Mapping[str, Any]) -> float:
    """The item's score; NaN where it has none. Infinity and NaN stand in the file as words."""
    score = line.get("score")
    try:
        return math.nan if score is None else float(score)
    except (TypeError, ValueError):
        return math.nan


# ------------------------------------------------------------------------------------------------ reading, checking


def _results(folder: Path) -> dict[str, Any]:
    path = folder / RESULTS
    try:
        results = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: can not be read ({error.strerror}); give a folder that `vlm eval` wrote") from None
    except ValueError as error:
        raise UsageError(f"{path}: not JSON ({error}); run `vlm eval` again") from None
    if not isinstance(results, dict) or not isinstance(results.get("tasks"), dict):
        raise UsageError(f'{path}: no "tasks" are in it; give a folder that `vlm eval` wrote')
    return results


def _samples(folder: Path, results: Mapping[str, Any]) -> Lines:
    """(task, id) -> line of samples.jsonl. Raises UsageError if the file is not whole, or an item stands in it twice."""
    path = folder / SAMPLES
    lines: Lines = {}
    for number, line in _lines(path):
        if not isinstance(line, dict) or "task" not in line or not isinstance(line.get("id"), int | str):
            raise UsageError(f"{path}:{number}: has no task and id; give a folder that `vlm eval` wrote")
        key = line["task"], line["id"]
        if key in lines:
            raise UsageError(f"{path}:{number}: item {key[1]} of {key[0]} stands in it twice; run `vlm eval` again")
        lines[key] = line
    if not lines:
        raise UsageError(f"{path}: holds 0 items; run `vlm eval` again")
    for task, metrics in results["tasks"].items():
        held = sum(key[0] == task for key in lines)
        if isinstance(metrics, dict) and metrics.get("n", held) != held:
            raise UsageError(f"{path}: {held} items of {task}, {metrics['n']} in {RESULTS}; run `vlm eval` again")
    return lines


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                yield number, json.loads(line)
    except OSError as error:
        raise UsageError(f"{path}: can not be read ({error.strerror}); give a folder that `vlm eval` wrote") from None
    except ValueError as error:
        raise UsageError(f"{path}:{number}: not JSON ({error}); run `vlm eval` again") from None


def _refuse_other_items(a: Path, ours: Lines, b: Path, theirs: Lines) -> None:
    missing, extra = [key for key in ours if key not in theirs], [key for key in theirs if key not in ours]
    asked = ("key", "references")
    changed = [key for key in ours if key in theirs and any(ours[key].get(x) != theirs[key].get(x) for x in asked)]
    faults = [f"{len(missing)} of {len(ours)} missing ({_first(missing)})"] if missing else []
    faults += [f"{len(extra)} of {len(theirs)} extra ({_first(extra)})"] if extra else []
    faults += [f"{len(changed)} with another sample or other references ({_first(changed)})"] if changed else []
    if faults:
        raise UsageError(f"{b}: not the items of {a}: {', '.join(faults)}; evaluate both on the same data")


def _first(keys: list[Key]) -> str:
    return ", ".join(f"{task} {one}" for task, one in keys[:NAMED]) + (", …" if len(keys) > NAMED else "")
