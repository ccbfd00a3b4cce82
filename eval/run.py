"""`vlm eval`: puts tasks to a model, on shards or on benchmarks as they are downloaded, and writes what came of it.

Knows what is answered already, result files and their form. Knows nothing of where data lies, or of how a task asks or
scores.

Blind and shuffled say how much of a score comes from the picture: a model that answers as well without it, or with a
picture of something else, has learnt the questions and not to see.

What is answered is kept beside OUT, in .OUT.answers, until the results are written, so that a killed run goes on where it
stopped. Of several processes each leaves the answers to its share of the parts there; then this one finds all answered, and
scores.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from vlm.api import load
from vlm.errors import UsageError
from vlm.files import atomic_write
from vlm.machine import environment, peak_memory_gib
from vlm.processes import Share
from vlm.quantization import parameter_count

from . import pictures
from .plan import Job, Plan, Settings, find_splits
from .processes import answer_in_processes
from .report_evaluation import write_evaluation
from .report_run import REPORT
from .resume import Answers, Kept, digest
from .tasks import TASKS, Item, Scored
from .tasks.base import Request
from .tasks.shots import Shots

__all__ = ["Shots", "evaluate", "find_splits", "summary"]

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
            line |= {"images": item.images} if item.images else {}
            line |= {"prediction": true.predictions[place], "references": item.references, "score": true.scores[place]}
            for name, scored in self.looks.items():
                if name != TRUE:
                    line[name] = {"prediction": scored.predictions[place], "score": scored.scores[place]}
            yield line


@dataclass(frozen=True)
class Effort:
    """What one of several processes spent: seconds by task, and the most memory it held, in GiB."""

    seconds: dict[str, float]
    peak_memory_gib: float


def evaluate(
    model: Any,
    tasks: Sequence[str],
    data: str | Path,
    out: str | Path | None = None,
    batch: int = 64,
    limit: int | None = None,
    blind: bool = True,
    shuffled: bool = True,
    choice: str | None = None,
    prompt: str | None = None,
    shots: int | Shots = 0,
    processes: int = 1,
) -> dict[str, Any]:
    """Score `model` (what `vlm.load` returns, or a path) on `tasks` and return what results.json holds.

    data: for the tasks on shards a folder of them, or one that holds `test` and perhaps `test-…` beside it; a task on such
    another split is called TASK@SPLIT, and runs where the split holds something for it. For a benchmark the folder that it
    was downloaded to, or one that holds it in a folder of the task's name. limit: the first so many samples of each split,
    or questions of each benchmark. out: a folder for samples.jsonl, the official result files, results.json, which is
    written when they are whole, and report.html, which shows it all. choice: how options are chosen, `generate`, `letters`
    or `texts`. prompt: a template in place of each benchmark's. shots: examples shown before each question. processes: how
    many answer, each its share.
    Raises UsageError for an unknown task, for data that holds nothing for a task or not all of it, and for what the model
    can not do.
    """
    for name, value in (("batch", batch), ("limit", limit), ("processes", processes)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; it must be at least 1")
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise UsageError(f"{out}: a file is there already; give another folder for the results")
    settings = Settings(choice, prompt, shots if isinstance(shots, Shots) else Shots(shots))
    plan = Plan(tuple(tasks), Path(data), settings, batch, limit, blind, shuffled)
    sources = plan.sources()
    with _answers_folder(out, processes) as folder:
        efforts: list[Effort] = []
        if processes > 1 and folder is not None:
            efforts = answer_in_processes(answer, model, plan, folder, processes)
        loaded = load(model, at_once=batch) if isinstance(model, str | Path) else model
        kept = Kept.of(folder, loaded)
        jobs = [job for source in sources for job in source.jobs(plan, loaded)]
        outcomes = [_outcome(job, loaded, plan, kept) for job in jobs]
        named = str(model) if isinstance(model, str | Path) else getattr(model.model, "name_or_path", "") or "in memory"
        results = _results(named, loaded, jobs, outcomes, plan, efforts)
        if out is not None:
            _write(Path(out), results, outcomes)
    return results


def answer(model: Any, plan: Plan, folder: Path, share: Share) -> Effort:
    """Put this process's share of all parts to the model, and leave the answers in `folder`."""
    kept = Kept.of(folder, model)
    seconds = {}
    for source in plan.sources():
        for job in source.jobs(plan, model):
            start = time.monotonic()
            for look in job.looks:
                _answered(job, look, model, plan, kept, share)
            seconds[job.name] = time.monotonic() - start
    return Effort(seconds, peak_memory_gib())


@contextmanager
def _answers_folder(out: str | Path | None, processes: int) -> Iterator[Path | None]:
    """Where answers are kept: beside `out`, to be removed when all went well; else, if processes must share them, for now."""
    if out is not None:
        place = Path(out).resolve()
        folder = place.with_name(f".{place.name}.answers")
        yield folder
        shutil.rmtree(folder, ignore_errors=True)
    elif processes > 1:
        with tempfile.TemporaryDirectory(prefix="vlm-eval-") as name:
            yield Path(name)
    else:
        yield None


def _outcome(job: Job, model: Any, plan: Plan, kept: Kept | None) -> Outcome:
    start = time.monotonic()
    scored = {}
    for look in job.looks:
        parts, answers = _answered(job, look, model, plan, kept, Share())
        pairs = ((part, answers[number]) for number, part in enumerate(parts))
        said = {request: one for part, each in pairs for request, one in zip(part, each, strict=True)}
        scored[look.name] = job.task.score(job.items, job.task.asking.gather(job.items, look, said))
    return Outcome(job.name, job.items, scored, time.monotonic() - start)


def _answered(
    job: Job, look: pictures.Look, model: Any, plan: Plan, kept: Kept | None, share: Share
) -> tuple[list[list[Request]], Answers]:
    """All parts, and the answers to a share of them; what is kept is not asked again."""
    asking = job.task.asking
    parts = asking.parts(job.items, look, plan.batch)
    name = job.name if look.name == TRUE else f"{job.name}, {look.name}"
    answers = Answers(kept, name, _bound(job, look, plan, parts) if kept else {}, share.process)
    left = [number for number in share.of(len(parts)) if number not in answers]
    for place, told in _progress(name, asking.answers(model, [parts[number] for number in left], look), len(left)):
        answers.put(left[place], told)
    return parts, answers


def _bound(job: Job, look: pictures.Look, plan: Plan, parts: list[list[Request]]) -> dict[str, Any]:
    """What answers belong to, beside the model: other data, prompts, settings or batches make other answers."""
    return {
        "task": job.name,
        "look": look.name,
        "data": str(job.data.resolve()),
        "settings": plan.settings.changed(),
        "batch": plan.batch,
        "parts": digest([[request.key for request in part] for part in parts]),
        "items": digest([(item.id, item.key, item.prompt, item.references) for item in job.items]),
    }


def _progress(label: str, answered: Iterable[Any], parts: int) -> Iterable[Any]:
    console = Console(stderr=True)
    hidden = not console.is_terminal
    return track(answered, description=label, total=parts, console=console, disable=hidden, transient=True)


def _results(
    named: str, model: Any, jobs: list[Job], outcomes: list[Outcome], plan: Plan, efforts: list[Effort]
) -> dict[str, Any]:
    """What results.json holds. The time of a task is that of the slowest process and of scoring; memory is all processes'."""
    answered = {outcome.name: max((one.seconds[outcome.name] for one in efforts), default=0.0) for outcome in outcomes}
    measured = {
        "seconds": {outcome.name: round(answered[outcome.name] + outcome.seconds, 2) for outcome in outcomes},
        "peak_memory_gib": round(peak_memory_gib() + sum(one.peak_memory_gib for one in efforts), 2),
        "finished": datetime.now(UTC).isoformat(),
    }
    return {
        "model": named,
        "data": {job.place: str(job.data.resolve()) for job in jobs},
        "limit": plan.limit,
        "settings": plan.settings.changed(),
        "unshuffled": [job.name for job in jobs if job.unshuffled],
        "blind_colour": pictures.zero_colour(model.processor),
        "tasks": {outcome.name: outcome.metrics() for outcome in outcomes},
        "gates": {key: list(pair) for key, pair in model.model.gates().items()},
        "parameters": parameter_count(model.model),
        "environment": environment() | measured,
    }


def _write(out: Path, results: dict[str, Any], outcomes: list[Outcome]) -> None:
    for name in (REPORT, "results.json"):  # what stands beside another run's numbers must not look like theirs
        (out / name).unlink(missing_ok=True)
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
    write_evaluation(out)


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
        if headline not in metrics:
            lines.append(f"{name}: no public answers to score by; hand in {name}_results.json  (n = {metrics['n']})")
            continue
        cells = [f"{name}: {headline} {_shown(metrics[headline])}"]
        cells += [f"{look} {_shown(metrics[look][headline])}" for look in ("blind", "shuffled") if look in metrics]
        if name in results["unshuffled"]:
            cells.append("not shuffled: there are no other pictures")
        lines.append("  ".join([*cells, f"(n = {metrics['n']})"]))
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
