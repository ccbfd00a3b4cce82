"""`vlm quantize`: a model folder in int8 or int4, and what that costs its answers, by contract.

Knows what is measured before and after, and what may be lost. Knows nothing of rounding, nor of how a task scores.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlm.api import VLM, load
from vlm.errors import RunError, UsageError
from vlm.files import atomic_write
from vlm.quantization import Entry, account, check_scheme, groups
from vlm.quantization import quantize as quantize_model
from vlm.samples import Sample
from vlm.saving import save
from vlm.shards import Shards

from .divergence import divergence
from .plan import find_splits
from .run import evaluate
from .tasks.shards import VQA, Captioning, ShardTask

TASKS: tuple[ShardTask, ...] = (VQA(), Captioning())


@dataclass(frozen=True)
class Tolerance:
    """What may be lost. vqa: points of accuracy, of 100. caption: per cent of CIDEr."""

    vqa: float = 0.5
    caption: float = 1.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value >= 0:
                raise UsageError(f"the {name} tolerance is {value}; it must be at least 0")


@dataclass(frozen=True)
class Score:
    """One task before and after. drop: lost points of 100 (vqa) or per cent (caption); below 0, gained."""

    metric: str
    before: float
    after: float
    drop: float
    tolerance: float
    unit: str
    n: int

    @property
    def held(self) -> bool:
        """Whether no more is lost than may be."""
        return self.drop <= self.tolerance


@dataclass(frozen=True)
class Report:
    """What `quantize` did. kl: of `eval.divergence`; with `scores` empty where no data was given."""

    scheme: str
    vision: bool
    entries: list[Entry]
    kl: dict[str, float | int] | None = None
    scores: dict[str, Score] = field(default_factory=dict)

    @property
    def broken(self) -> list[str]:
        """The tasks that lost too much."""
        return [name for name, score in self.scores.items() if not score.held]

    def as_json(self) -> dict[str, Any]:
        """Plain values: the contract, and modules and bytes by scheme or reason."""
        told = {
            label: {
                "modules": len(group),
                "bytes": sum(e.bytes for e in group),
                "float32": sum(e.before for e in group),
            }
            for label, group in groups(self.entries).items()
        }
        scores = {name: asdict(score) | {"held": score.held} for name, score in self.scores.items()}
        return {"scheme": self.scheme, "vision": self.vision, "kl": self.kl, "scores": scores, "weights": told}

    def lines(self) -> list[str]:
        """The contract for a person to read."""
        if self.kl is None:
            return ["quality: not measured, for no --data was given"]
        kl = f"KL {self.kl['mean']:.2e} nats a token, at most {self.kl['max']:.2e}"
        return [
            f"logits: {kl}; the same likeliest word at {100 * self.kl['agree']:.2f} % of {self.kl['tokens']} tokens",
            *(_line(name, score) for name, score in self.scores.items()),
        ]


def quantize(
    model: str | Path,
    out: str | Path,
    scheme: str,
    vision: bool = False,
    data: str | Path | None = None,
    tolerance: Tolerance | None = None,
    batch: int = 64,
    limit: int | None = None,
    report: str | Path | None = None,
) -> Report:
    """Write `model` quantized to the folder `out`, unless `data` shows that it loses more than `tolerance`.

    data: shards with questions or captions of pictures, or a folder that holds `test`. limit: the first so many samples.
    report: a JSON file for the numbers, written either way. Raises UsageError for what cannot be measured or quantized, and
    RunError for a broken contract; then nothing is written to `out`.
    """
    check_scheme(scheme)
    if Path(out).resolve() == Path(model).resolve() or Path(out).is_file():
        raise UsageError(f"{out} is {'a file' if Path(out).is_file() else 'the model itself'}; give another folder")
    tolerance = tolerance or Tolerance()
    place = None if data is None else find_splits(Path(data))[""]
    samples = [] if place is None else Shards.open(place).first(limit)
    smaller = load(model)
    quantize_model(smaller.model, scheme, vision)
    done = Report(scheme, vision, account(smaller.model))
    if place is not None:
        full = load(model)
        names = _tasks(samples, full, place)
        before, after = ({name: _score(one, name, place, batch, limit) for name in names} for one in (full, smaller))
        scores = {name: _compared(name, before[name], after[name], tolerance) for name in names}
        done = Report(scheme, vision, done.entries, divergence(full, smaller, samples, batch), scores)
    if report is not None:
        with atomic_write(report, "w") as file:
            json.dump(done.as_json(), file, indent=1)
            file.write("\n")
    if done.broken:
        told = "; ".join(_line(name, done.scores[name]) for name in done.broken)
        raise RunError(f"{scheme} breaks the contract: {told}; nothing was written to {out}")
    save(smaller.model, smaller.processor, out)
    return done


def _tasks(samples: Sequence[Sample], model: VLM, place: Path) -> list[str]:
    found = [task.name for task in TASKS if task.items(samples, model.processor.caption_prompt)]
    if not found:
        raise UsageError(f"{place} holds neither questions nor captions of pictures; give data that does, or none")
    return found


def _score(model: VLM, name: str, place: Path, batch: int, limit: int | None) -> dict[str, Any]:
    results = evaluate(model, [name], place, batch=batch, limit=limit, blind=False, shuffled=False)
    return results["tasks"][name]


def _compared(name: str, before: dict[str, Any], after: dict[str, Any], tolerance: Tolerance) -> Score:
    if name == "vqa":
        points = 100 * (before["accuracy"] - after["accuracy"])
        return Score("accuracy", before["accuracy"], after["accuracy"], points, tolerance.vqa, "points", before["n"])
    was, now = before["CIDEr"], after["CIDEr"]
    return Score("CIDEr", was, now, 100 * (was - now) / was if was else 0.0, tolerance.caption, "%", before["n"])


def _line(name: str, score: Score) -> str:
    change = f"{score.before:.4f} → {score.after:.4f}"
    verdict = "within" if score.held else "beyond"
    lost = f"a loss of {score.drop:.2f} {score.unit}, {verdict} {score.tolerance:g}"
    return f"{name}: {score.metric} {change} (n = {score.n}), {lost}"
