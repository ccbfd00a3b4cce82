"""What is in some shards, and what is wrong with them.

Knows how to count, measure and check everything that `vlm.shards` and `vlm.samples` promise. Changes nothing, and after
a fault goes on to name the others. Knows nothing of how the page looks that shows it.

A report stays small whatever the number of samples: it counts and does not collect. What grows is 8 bytes for every key
and 8 for every caption, by which repeated ones are found, and a line for every shard.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vlm.errors import RunError, UsageError
from vlm.images import open_image
from vlm.samples import Sample, parse_sample
from vlm.shards import INDEX, Entry, read_index, scan, shard_files

from .inspect_counts import KEPT_LETTERS, Histogram, Tally, short

SHOWN_FAULTS = 20
DRAWN = 36  # samples for the contact sheet
# Bounds of what a report holds.
KEPT_FAULTS = 1000
KEPT_TYPES = 100  # types of questions; VQAv2 has 65
FAULT_LETTERS = 500
OTHERS = "other types"


@dataclass
class Report:
    """Everything `inspect` found; `rich.print` shows it. A sound set has no `faults`.

    `faults` holds the first 1,000 faults, a line each; `fault_count` is how many there are.
    """

    path: str
    bytes: int = 0
    samples: int = 0
    holding: Counter[str] = field(default_factory=Counter)  # images, caption, questions, messages, text -> samples
    augmented: int = 0
    images_per_sample: Histogram = field(default_factory=Histogram)
    bytes_per_sample: Histogram = field(default_factory=Histogram)
    widths: Histogram = field(default_factory=Histogram)
    heights: Histogram = field(default_factory=Histogram)
    words: dict[str, Histogram] = field(default_factory=lambda: defaultdict(Histogram))  # caption, question, …
    tokenizer: str | None = None
    tokens: dict[str, Histogram] = field(default_factory=lambda: defaultdict(Histogram))
    answers: dict[str, Tally] = field(default_factory=dict)  # by type of question
    faults: list[str] = field(default_factory=list)
    fault_count: int = 0
    tars: list[tuple[Path, int]] = field(default_factory=list)  # in order, with how many samples lie in each
    keys: array[int] = field(default_factory=lambda: array("Q"))  # a hash of every key, in order
    captions: array[int] = field(default_factory=lambda: array("Q"))  # a hash of every caption
    drawn: list[tuple[int, Entry]] = field(default_factory=list)  # some samples by chance, for the contact sheet

    @property
    def shards(self) -> int:
        """How many tars were looked into."""
        return len(self.tars)

    @property
    def distinct_captions(self) -> int:
        """How many captions differ (by 64 bits: that any two of a million fall together has a chance of 3e-8)."""
        return np.unique(np.frombuffer(self.captions, np.uint64)).size if self.captions else 0

    def fault(self, line: str) -> None:
        """Note a fault."""
        self.fault_count += 1
        if len(self.faults) < KEPT_FAULTS:
            self.faults.append(short(line, FAULT_LETTERS))

    def answers_to(self, kind: str | None) -> Tally:
        """Where the answers to questions of one type are counted; what exceeds 100 types shares one place."""
        kind = short(kind or "untyped", KEPT_LETTERS)
        if kind not in self.answers and len(self.answers) >= KEPT_TYPES:
            kind = OTHERS
        return self.answers.setdefault(kind, Tally())

    def draw(self, chance: int, entry: Entry) -> None:
        """Keep the samples of the lowest numbers: given a hash of the key, a choice that no order of reading changes."""
        if len(self.drawn) < DRAWN or chance < self.drawn[-1][0]:
            insort(self.drawn, (chance, entry), key=lambda one: one[0])
            del self.drawn[DRAWN:]

    def merge(self, other: Report) -> None:
        """Add what was found in the shards that follow."""
        self.bytes += other.bytes
        self.samples += other.samples
        self.holding.update(other.holding)
        self.augmented += other.augmented
        for name in ("images_per_sample", "bytes_per_sample", "widths", "heights"):
            getattr(self, name).merge(getattr(other, name))
        for kind, histogram in other.words.items():
            self.words[kind].merge(histogram)
        for kind, histogram in other.tokens.items():
            self.tokens[kind].merge(histogram)
        for kind, tally in other.answers.items():
            self.answers_to(kind).merge(tally)
        self.faults += other.faults[: KEPT_FAULTS - len(self.faults)]
        self.fault_count += other.fault_count
        self.tars += other.tars
        self.keys.extend(other.keys)
        self.captions.extend(other.captions)
        for chance, entry in other.drawn:
            self.draw(chance, entry)

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of every line of the table."""
        rows = [("shards", f"{self.shards}, {self.bytes / 1e6:,.1f} MB"), ("samples", f"{self.samples:,}")]
        rows += [(f"  with {part}", f"{number:,}") for part, number in self.holding.items()]
        rows += [("  augmented", f"{self.augmented:,}")] if self.augmented else []
        rows += [("images per sample", str(self.images_per_sample)), ("bytes per sample", str(self.bytes_per_sample))]
        rows += [("width × height", f"{self.widths} × {self.heights}")] if self.widths.count else []
        rows += [(f"words: {kind}", str(lengths)) for kind, lengths in self.words.items()]
        rows += [(f"tokens: {kind}", str(lengths)) for kind, lengths in self.tokens.items()]
        rows += [("distinct captions", f"{self.distinct_captions:,}")] if self.captions else []
        rows += [(f"questions: {kind}", str(tally)) for kind, tally in self.answers.items()]
        return [*rows, ("faults", f"{self.fault_count:,}")]

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "path": self.path,
            "shards": self.shards,
            "bytes": self.bytes,
            "samples": self.samples,
            "with": dict(self.holding),
            "augmented": self.augmented,
            "images_per_sample": self.images_per_sample.as_dict(),
            "bytes_per_sample": self.bytes_per_sample.as_dict(),
            "widths": self.widths.as_dict(),
            "heights": self.heights.as_dict(),
            "words": {kind: lengths.as_dict() for kind, lengths in self.words.items()},
            "tokenizer": self.tokenizer,
            "tokens": {kind: lengths.as_dict() for kind, lengths in self.tokens.items()},
            "distinct_captions": self.distinct_captions,
            "questions": {kind: tally.as_dict() for kind, tally in self.answers.items()},
            "fault_count": self.fault_count,
            "faults": list(self.faults),
        }

    def __rich__(self) -> Group:
        table = Table(title=self.path, title_justify="left", show_header=False)
        for label, value in self.rows():
            table.add_row(Text(label), Text(value))
        lines = [Text(f"fault: {fault}", style="red") for fault in self.faults[:SHOWN_FAULTS]]
        more = self.fault_count - SHOWN_FAULTS
        return Group(table, *lines, *([Text(f"… and {more:,} faults more")] if more > 0 else []))


class Found(NamedTuple):
    """A tar to look into, and what the index says of it; None where there is no index."""

    tar: Path
    listed: dict[str, Any] | None = None


def inspect(
    path: str | Path,
    tokenizer: str | None = None,
    map: Callable[[Callable[[Found], Report], Iterable[Found]], Iterable[Report]] = map,
) -> Report:
    """Read every shard, sample and picture of a folder, a tar or `name-{00000..00012}.tar`.

    `tokenizer`, a Hugging Face id or path or a model's folder, adds the lengths of texts in tokens. `map` gives a
    function's results in the order of its arguments: the one of a process pool looks into several shards at once.
    Raises UsageError if there is nothing to look at or no such tokenizer; everything else becomes a line of `faults`.
    """
    report = Report(str(path), tokenizer=tokenizer)
    found = _tars(Path(path), report)
    if tokenizer is not None:
        load_tokenizer(tokenizer)
    for part in map(partial(inspect_shard, tokenizer=tokenizer), found):
        report.merge(part)
    _name_repeated_keys(report)
    return report


def inspect_shard(found: Found, tokenizer: str | None = None) -> Report:
    """Look into one shard. Depends on nothing but its file, so shards may be looked into anywhere and in any order."""
    tar, listed = found
    report = Report(str(tar), bytes=tar.stat().st_size, tokenizer=tokenizer)
    for line in _against_index(tar, listed) if listed else ():
        report.fault(line)
    for entry in _entries(tar, report):
        key, chance = _hash(entry.key, 2)
        report.keys.append(key)
        report.samples += 1
        try:
            parts = entry.read()
            report.bytes_per_sample.add(sum(map(len, parts.values())))
            sample = parse_sample(entry.key, parts)
        except (UsageError, RunError) as error:
            report.fault(f"{tar}: {error}")
            continue
        _add(report, sample, tar)
        report.draw(chance, entry)
    report.tars.append((tar, report.samples))
    if listed and report.samples != listed["samples"]:
        report.fault(f"{tar}: {report.samples} samples, {INDEX} says {listed['samples']}")
    return report


@lru_cache(maxsize=1)
def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face id or path or a model's folder; the last one stays loaded. Raises UsageError."""
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # whatever a damaged tokenizer.json raises; `tokenizers` raises bare Exception
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(
            f"tokenizer {source}: can not be read ({reason}); give a Hugging Face id or a folder"
        ) from None


def _tars(path: Path, report: Report) -> list[Found]:
    """The tars to look into. What the index says of them and they are not is a fault."""
    if not path.is_dir():
        return [Found(tar) for tar in shard_files(path)]
    tars = sorted(path.glob("*.tar"))
    if not tars and not (path / INDEX).is_file():
        inner = sorted(folder.parent.name for folder in path.glob(f"*/{INDEX}"))
        mend = f"give one of its folders {', '.join(inner)}" if inner else "give a folder of .tar files"
        raise UsageError(f"{path}: no shards; {mend}")
    try:
        listed = {shard["file"]: shard for shard in read_index(path)}
    except UsageError as error:
        report.fault(str(error))
        return [Found(tar) for tar in tars]
    names = {tar.name for tar in tars}
    for name in listed:
        if name not in names:
            report.fault(f"{path / name}: missing, {INDEX} lists it")
    for name in sorted(names - set(listed)):
        report.fault(f"{path / name}: not in {INDEX}")
    return [Found(tar, listed.get(tar.name)) for tar in tars]


def _against_index(tar: Path, listed: dict[str, Any]) -> Iterator[str]:
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
        report.fault(str(error))


def _add(report: Report, sample: Sample, tar: Path) -> None:
    report.images_per_sample.add(len(sample.images))
    report.augmented += bool(sample.extra.get("augmented"))
    for part in ("images", "caption", "questions", "messages", "text"):
        report.holding[part] += bool(getattr(sample, part))
    for number, image in enumerate(sample.images):
        try:
            width, height = open_image(image, name=f"image {number} of sample {sample.key}").size
        except UsageError as error:
            report.fault(f"{tar}: {error}")
            continue
        report.widths.add(width)
        report.heights.add(height)
    report.captions.extend(_hash(caption)[0] for caption in sample.captions)
    for question in sample.questions:
        report.answers_to(question.type).add(question.answer)
    _add_lengths(report, list(_texts(sample)))
    places = sum(part["type"] == "image" for message in sample.messages for part in message["content"])
    if sample.messages and places < len(sample.images):
        report.fault(f"{tar}: sample {sample.key}: messages place {places} of {len(sample.images)} images")


def _texts(sample: Sample) -> Iterator[tuple[str, list[str]]]:
    """Every text of a sample with what it is; a conversation is one text of several pieces."""
    for caption in sample.captions:
        yield "caption", [caption]
    if sample.text:
        yield "text", [sample.text]
    for question in sample.questions:
        yield "question", [question.text]
        yield "answer", [question.answer]
    parts = [part for message in sample.messages for part in message["content"]]
    if parts:
        yield "conversation", [part["text"] for part in parts if "text" in part]


def _add_lengths(report: Report, texts: list[tuple[str, list[str]]]) -> None:
    for kind, pieces in texts:
        report.words[kind].add(sum(len(piece.split()) for piece in pieces))
    every = [piece for _, pieces in texts for piece in pieces]
    if report.tokenizer is None or not every:
        return
    tokenizer = load_tokenizer(report.tokenizer)
    # All of a sample at once, since a call costs more than a short text. Not verbose: no model is there to be too short.
    encoded = iter(tokenizer(every, add_special_tokens=False, verbose=False)["input_ids"])
    for kind, pieces in texts:
        report.tokens[kind].add(sum(len(ids) for ids in islice(encoded, len(pieces))))


def _name_repeated_keys(report: Report) -> None:
    """Note every key that an earlier shard has too. Names are read again from the shards, since only hashes were kept."""
    keys = np.frombuffer(report.keys, np.uint64) if report.keys else np.empty(0, np.uint64)
    order = np.argsort(keys, kind="stable")
    again = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
    # Of each repetition its own place and the one before it, as places among all samples in reading order.
    pairs = np.stack([order[again + 1], order[again]], axis=1)
    named = pairs[np.argsort(pairs[:, 0])][: KEPT_FAULTS - len(report.faults)]
    ends = np.cumsum([samples for _, samples in report.tars])
    shards = np.searchsorted(ends, named, side="right").tolist()
    starts = [0, *ends.tolist()]
    for shard, group in groupby(zip(named.tolist(), shards, strict=True), key=lambda one: one[1][0]):
        tar = report.tars[shard][0]
        earlier = {here - starts[shard]: report.tars[other][0] for (here, _), (_, other) in group}
        for number, entry in enumerate(islice(scan(tar), max(earlier) + 1)):
            if number in earlier:
                report.fault(f"{tar}: key {entry.key} is in {earlier[number]} too")
    report.fault_count += len(pairs) - len(named)


def _hash(text: str, numbers: int = 1) -> list[int]:
    """Independent 64-bit numbers that depend on the text alone."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8 * numbers).digest()
    return [int.from_bytes(digest[8 * number : 8 * number + 8], "little") for number in range(numbers)]
