"""What is in some shards, and what is wrong with them.

Knows how to count, measure and check everything that `vlm.shards` and `vlm.samples` promise. Changes nothing, and after
a fault goes on to name the others.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from rich.console import Group
from rich.table import Table
from rich.text import Text

from vlm.errors import RunError, UsageError
from vlm.images import open_image
from vlm.samples import Sample, parse_sample
from vlm.shards import INDEX, Entry, read_index, scan, shard_files

SHOWN_FAULTS = 20
SHOWN_ANSWERS = 6


@dataclass
class Report:
    """Everything `inspect` found. `faults` holds one line each; a sound set has none. `rich.print` shows it."""

    path: str
    shards: int = 0
    bytes: int = 0
    samples: int = 0
    holding: Counter[str] = field(default_factory=Counter)  # caption, questions, messages, text, image -> samples
    images_per_sample: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    words: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # caption, question, … -> lengths
    distinct_captions: int = 0
    answers: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))  # question type -> answers
    faults: list[str] = field(default_factory=list)

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of every line of the table."""
        rows = [("shards", f"{self.shards}, {self.bytes / 1e6:,.1f} MB"), ("samples", f"{self.samples:,}")]
        rows += [(f"  with {part}", f"{number:,}") for part, number in self.holding.items()]
        rows += [("images per sample", _spread(self.images_per_sample))]
        rows += [("width × height", f"{_spread(self.widths)} × {_spread(self.heights)}")] if self.widths else []
        rows += [(f"words: {name}", _spread(lengths)) for name, lengths in self.words.items()]
        rows += [("distinct captions", f"{self.distinct_captions:,}")] if self.distinct_captions else []
        rows += [(f"questions: {name}", _shares(answers)) for name, answers in self.answers.items()]
        return [*rows, ("faults", f"{len(self.faults):,}")]

    def __rich__(self) -> Group:
        table = Table(title=self.path, title_justify="left", show_header=False)
        for label, value in self.rows():
            table.add_row(Text(label), Text(value))
        lines = [Text(f"fault: {fault}", style="red") for fault in self.faults[:SHOWN_FAULTS]]
        more = len(self.faults) - SHOWN_FAULTS
        return Group(table, *lines, *([Text(f"… and {more:,} faults more")] if more > 0 else []))


def inspect(path: str | Path) -> Report:
    """Read every shard, sample and picture of a folder, a tar or `name-{00000..00012}.tar`.

    Raises UsageError only if there is nothing there to look at; everything else becomes a line of `faults`.
    """
    report = Report(str(path))
    keys: dict[str, Path] = {}
    captions: set[str] = set()
    for tar, promised in _tars(Path(path), report):
        report.shards += 1
        report.bytes += tar.stat().st_size
        before = report.samples
        for entry in _entries(tar, report):
            if entry.key in keys:
                report.faults.append(f"{tar}: key {entry.key} is in {keys[entry.key]} too")
            keys[entry.key] = tar
            report.samples += 1
            try:
                _add(report, parse_sample(entry.key, entry.read()), tar, captions)
            except (UsageError, RunError) as error:
                report.faults.append(f"{tar}: {error}")
        if promised is not None and report.samples - before != promised:
            report.faults.append(f"{tar}: {report.samples - before} samples, {INDEX} says {promised}")
    report.distinct_captions = len(captions)
    return report


def _tars(path: Path, report: Report) -> list[tuple[Path, int | None]]:
    """The tars to look into, and how many samples the index promises. What it says of them and they are not is a fault."""
    if not path.is_dir():
        return [(tar, None) for tar in shard_files(path)]
    tars = sorted(path.glob("*.tar"))
    if not tars and not (path / INDEX).is_file():
        inner = sorted(folder.parent.name for folder in path.glob(f"*/{INDEX}"))
        mend = f"give one of its folders {', '.join(inner)}" if inner else "give a folder of .tar files"
        raise UsageError(f"{path}: no shards; {mend}")
    try:
        listed = {shard["file"]: shard for shard in read_index(path)}
    except UsageError as error:
        report.faults.append(str(error))
        return [(tar, None) for tar in tars]
    found = {tar.name for tar in tars}
    report.faults += [f"{path / name}: missing, {INDEX} lists it" for name in listed if name not in found]
    report.faults += [f"{path / name}: not in {INDEX}" for name in sorted(found - set(listed))]
    for tar in tars:
        if tar.name in listed:
            report.faults += _against_index(tar, listed[tar.name])
    return [(tar, listed[tar.name]["samples"] if tar.name in listed else None) for tar in tars]


def _against_index(tar: Path, listed: dict) -> Iterator[str]:
    size = tar.stat().st_size
    if size != listed["bytes"]:
        yield f"{tar}: {size} bytes, {INDEX} says {listed['bytes']}"
        return
    with open(tar, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != listed["sha256"]:
        yield f"{tar}: sha256 {digest[:12]}…, {INDEX} says {listed['sha256'][:12]}…; bytes have changed"


def _entries(tar: Path, report: Report) -> Iterator[Entry]:
    """The samples of one tar up to its first structural fault, which is noted."""
    try:
        yield from scan(tar)
    except UsageError as error:
        report.faults.append(str(error))


def _add(report: Report, sample: Sample, tar: Path, captions: set[str]) -> None:
    report.images_per_sample.append(len(sample.images))
    for part in ("images", "caption", "questions", "messages", "text"):
        report.holding[part] += bool(getattr(sample, part))
    for number, image in enumerate(sample.images):
        try:
            size = open_image(image, name=f"image {number} of sample {sample.key}").size
        except UsageError as error:
            report.faults.append(f"{tar}: {error}")
            continue
        report.widths.append(size[0])
        report.heights.append(size[1])
    if sample.caption:
        captions.add(sample.caption)
        report.words["caption"].append(len(sample.caption.split()))
    if sample.text:
        report.words["text"].append(len(sample.text.split()))
    for question in sample.questions:
        report.words["question"].append(len(question.text.split()))
        report.words["answer"].append(len(question.answer.split()))
        report.answers[question.type or "untyped"][question.answer] += 1
    parts = [part for message in sample.messages for part in message["content"]]
    if parts:
        report.words["conversation"].append(sum(len(part["text"].split()) for part in parts if "text" in part))
        places = sum(part["type"] == "image" for part in parts)
        if places < len(sample.images):
            report.faults.append(f"{tar}: sample {sample.key}: messages place {places} of {len(sample.images)} images")


def _spread(values: Sequence[int]) -> str:
    return f"{median(values):g} (from {min(values)} to {max(values)})" if values else "none"


def _shares(answers: Counter[str]) -> str:
    total = answers.total()
    named = ", ".join(f"{answer} {count / total:.1%}" for answer, count in answers.most_common(SHOWN_ANSWERS))
    more = len(answers) - SHOWN_ANSWERS
    return f"{total:,}: {named}" + (f", {more:,} more" if more > 0 else "")
