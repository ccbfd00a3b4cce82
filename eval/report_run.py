"""What a run left to be shown: its log, config, results and samples. Knows files and their fields; nothing of HTML."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vlm.errors import UsageError
from vlm.samples import Sample
from vlm.shards import Shards

Fields = dict[str, Any]
REPORT = "report.html"


@dataclass
class RunRecord:
    """Everything the report reads. What is not there is empty; `missing` says in a sentence what that is."""

    folder: Path
    config_text: str = ""
    config: Fields = field(default_factory=dict)
    stages: list[list[Fields]] = field(default_factory=list)  # per stage, the lines of its steps
    events: list[Fields] = field(default_factory=list)
    results: Fields = field(default_factory=dict)
    samples: list[Fields] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def tasks(self) -> Fields:
        """Task name -> its metrics, as in results.json."""
        return self.results.get("tasks", {})

    def environment(self) -> Fields:
        """Machine, versions and command of the evaluation."""
        return self.results.get("environment", {})

    def objective(self, stage: int) -> str:
        """What a stage trained, as its config calls it."""
        stages = self.config.get("stages") or []
        named = stages[stage] if stage < len(stages) and isinstance(stages[stage], dict) else {}
        return str(named.get("objective", f"stage {stage + 1}"))

    def seconds(self, stage: int) -> float:
        """How long a stage trained, by its last line."""
        return max((number(line.get("seconds")) or 0.0 for line in self.stages[stage]), default=0.0)

    def validations(self, stage: int) -> list[Fields]:
        """The validation events of a stage, in order."""
        return [e for e in self.events if e.get("event") == "validation" and e.get("stage", 0) == stage]

    def gates(self) -> Fields:
        """Layer -> tanh of its attention and feed-forward gate: of the evaluated model, else as last validated."""
        logged = [event["gates"] for event in self.events if event.get("gates")]
        return self.results.get("gates") or (logged[-1] if logged else {})

    def told(self, name: str) -> list[Any]:
        """Every value that an event of the log gives `name`."""
        return [event[name] for event in self.events if event.get(name) is not None]


def read_run(folder: Path) -> RunRecord:
    """Read a run's folder. Raises UsageError if it is not there or holds neither a log nor results."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give the `out` of a training run")
    run = RunRecord(folder)
    _read_config(run, folder / "config.yaml")
    _read_log(run, folder / "log.jsonl")
    _read_results(run, folder / "eval")
    if not (run.stages or run.events or run.results) and (folder / "results.json").exists():
        raise UsageError(
            f"{folder}: an evaluation, and `vlm eval` wrote {REPORT} into it; give the `out` of a training run"
        )
    if not (run.stages or run.events or run.results):
        raise UsageError(
            f"{folder}: neither log.jsonl nor eval/results.json is in it; give the `out` of a training run"
        )
    return run


def read_evaluation(folder: Path) -> RunRecord:
    """Read the folder of an evaluation alone. Raises UsageError if its results are no JSON object."""
    evaluation = RunRecord(folder)
    _read_results(evaluation, folder)
    return evaluation


def number(value: Any) -> float | None:
    """A finite number, else None: the log writes NaN and infinity as strings."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def pictured(run: RunRecord) -> Iterator[tuple[Sample, list[Fields]]]:
    """Each sample of the main split with the lines about it, in the order of samples.jsonl; none if the data is gone."""
    lines: dict[str, list[Fields]] = {}
    for line in run.samples:
        if "@" not in str(line.get("task", "")):
            lines.setdefault(str(line.get("key")), []).append(line)
    source = run.results.get("data", {}).get("main")
    if source is None:
        return
    try:
        shards = Shards.open(source)
    except UsageError:
        run.missing.append(f"The held-out data is no longer at {source}, so no pictures can be shown.")
        return
    try:
        places = {key: place for place, key in enumerate(shards.keys)}
    except UsageError as error:
        run.missing.append(f"The held-out data has changed, so no pictures can be shown: {error}.")
        return
    for key, about in lines.items():
        if key in places:
            yield shards[places[key]], about


def _read_config(run: RunRecord, path: Path) -> None:
    if not path.exists():
        run.missing.append(f"There is no {path.name} in the run's folder, so its settings are not shown.")
        return
    run.config_text = path.read_text("utf-8", errors="replace")
    try:
        values = yaml.safe_load(run.config_text)
    except yaml.YAMLError:
        values = None
    run.config = values if isinstance(values, dict) else {}


def _read_log(run: RunRecord, path: Path) -> None:
    if not path.exists():
        run.missing.append(
            f"There is no {path.name} in the run's folder, so there are no curves; `vlm train` writes one."
        )
        return
    steps: dict[int, dict[int, Fields]] = {}
    for line in _json_lines(path):
        if "event" in line:
            run.events.append(line)
        elif isinstance(line.get("step"), int):
            # A resumed run writes some steps again; the last writing is the one that counts.
            steps.setdefault(int(line.get("stage", 0)), {})[line["step"]] = line
    last = max(steps, default=-1)
    run.stages = [[steps[stage][step] for step in sorted(steps.get(stage, {}))] for stage in range(last + 1)]


def _read_results(run: RunRecord, folder: Path) -> None:
    if not (folder / "results.json").exists():
        run.missing.append(
            "There is no eval/results.json in the run's folder, so there are no scores; `vlm eval` writes one."
        )
        return
    try:
        results = json.loads((folder / "results.json").read_text("utf-8"))
    except (ValueError, RecursionError):
        results = None
    if not isinstance(results, dict):
        raise UsageError(f"{folder / 'results.json'}: not a JSON object; run `vlm eval` again")
    run.results = results
    if (folder / "samples.jsonl").exists():
        run.samples = list(_json_lines(folder / "samples.jsonl"))
    else:
        run.missing.append("There is no eval/samples.jsonl in the run's folder, so no pictures can be shown.")


def _json_lines(path: Path) -> Iterator[Fields]:
    """The objects of a JSON-lines file; a line that a kill cut short is passed over."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                yield line
