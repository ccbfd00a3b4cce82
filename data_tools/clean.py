"""`vlm data clean`: which samples of some shards may stay; the others are kept aside, each with its reason.

Knows the order of the judgements and what is remembered of them. Knows nothing of how a text, a picture or a likeness is
judged.

Three passes over the shards, each on all cores: `judge` reads every sample once, applies the rules that need nothing but
the sample, scores agreement and leaves marks to compare samples by; duplicates and contamination are found from the marks
alone; `write` reads the samples again and puts each where it belongs.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from vlm.errors import UsageError
from vlm.images import open_image
from vlm.samples import Sample, parse_sample, said
from vlm.shards import Entry, ShardFile, Shards, scan, write_index
from vlm.storage import Folder, is_address, join

from . import clean_image, dedup
from .clean_agreement import Agreement
from .clean_report import Example, Summary, write_report
from .clean_rules import Reason, Rules
from .clean_text import clean_fields
from .dedup_image import image_hash
from .engines import LocalEngine
from .job import Engine, Job, PieceWriter, job

DROPPED = "dropped"  # the folder, in the output, of what was left out
EXAMPLES = 6  # of each reason, in the report
Mode = Literal["text", "image", "pair"]


@dataclass(frozen=True)
class Judged:
    """What `judge` found of a shard's samples: keys, reasons ("" to stay), agreement (nan where it was not scored)."""

    keys: np.ndarray
    reasons: np.ndarray
    agreement: np.ndarray

    def save(self, folder: str, piece: str) -> None:
        """Write it as what was found of `piece`."""
        with Folder(folder).write(f"{piece}.npz") as file:
            np.savez(file, keys=self.keys, reasons=self.reasons, agreement=self.agreement)


@dataclass(frozen=True)
class Cleaning:
    """What every worker knows: the rules, where marks and judgements lie, and how many evaluation shards come first."""

    rules: Rules
    scratch: str
    protected: int

    @property
    def modes(self) -> tuple[Mode, ...]:
        """By what samples are compared: duplicates as the rules say; with evaluation sets, pictures, and texts without."""
        by = self.rules.duplicates.by
        wanted: set[Mode] = set() if by == "none" else {by}
        return tuple(sorted(wanted | ({"image", "pair"} if self.protected else set())))

    def likeness(self, mode: Mode) -> dedup.Rules:
        """When two samples are near by this mode."""
        return dedup.Rules(mode, self.rules.duplicates.jaccard, self.rules.duplicates.distance)

    def marks(self, mode: Mode) -> str:
        """The folder of this mode's marks."""
        return f"{self.scratch}/marks-{mode}"

    @property
    def judged(self) -> str:
        """The folder of judgements."""
        return f"{self.scratch}/judged"

    def judgement(self, piece: str) -> Judged:
        """What was found of a piece."""
        with np.load(Path(self.judged, f"{piece}.npz")) as file:
            return Judged(file["keys"], file["reasons"], file["agreement"])

    def piece(self, number: int) -> str:
        """The name of a piece, the evaluation sets' counted first."""
        return f"eval-{number:05d}" if number < self.protected else f"{number - self.protected:05d}"

    def sign(self, piece: str, texts: Sequence[str | None], hashes: Sequence[Sequence[int]]) -> None:
        """Leave the marks of a piece's samples, for each mode."""
        for mode in self.modes:
            dedup.sign(texts, hashes, self.likeness(mode)).save(self.marks(mode), piece)


def clean(
    source: str | Path,
    out: str | Path,
    rules: Rules,
    *,
    scratch: str | Path | None = None,
    engine: Engine | None = None,
) -> Summary:
    """Write what of the shards `source` the rules let stay to the new folder `out`, and return what was counted.

    OUT/dropped holds the others as shards, with the reason in each sample's JSON under "dropped"; OUT/report.json and
    OUT/report.html count the reasons and show examples. Keys, and the number of each shard, stay. scratch: a folder that
    every worker sees, for what is needed meanwhile, in a folder of its own that goes in the end; by default within the
    unfinished output, so an `out` at an address needs one. Killed and started again with the same arguments it goes on
    where it was.
    """
    if is_address(out) and scratch is None:
        raise UsageError(f"{out}: an address is no place to work in; give --scratch a folder that every worker sees")
    files = Shards.open(source).files
    guarded = [file for place in rules.contamination for file in Shards.open(place).files]
    settings = {
        "clean": [asdict(file) for file in files],
        "guarded": [asdict(file) for file in guarded],
        "rules": rules.model_dump(mode="json"),
    }
    with job(out, settings, engine or LocalEngine()) as work, _workplace(work, scratch) as place:
        cleaning = Cleaning(rules, place, len(guarded))
        total = sum(file.samples for file in files)
        _finished(work.run("sign", partial(_sign_guarded, cleaning), guarded, sum(file.samples for file in guarded)))
        _finished(work.run("judge", partial(_judge, cleaning), files, total))
        pieces = [cleaning.piece(number) for number in range(len(guarded) + len(files))]
        for mode in cleaning.modes:
            likeness = cleaning.likeness(mode)
            dedup.find_duplicates(cleaning.marks(mode), pieces, likeness, len(guarded), work.engine.map)
        limit = _agreement_limit(cleaning, pieces[len(guarded) :])
        done = list(work.run("write", partial(_write, cleaning, limit), files, total))
        _index(work.folder.place, done)
        summary = _summary(source, rules, done, Folder(join(work.folder.place, DROPPED)))
        write_report(work.folder, summary)
    return summary


@contextmanager
def _workplace(work: Job, scratch: str | Path | None) -> Iterator[str]:
    """The job's own folder within `scratch`, which stays as long as the unfinished output does.

    Where that of a killed run is gone, what was done in it is done again.
    """
    if scratch is None:
        yield work.scratch("clean").place
        return
    output = work.folder.place if is_address(work.folder.place) else os.path.abspath(work.folder.place)
    place = Path(scratch, f"clean-{sha256(os.fsencode(output)).hexdigest()[:16]}")
    if not place.is_dir():
        work.forget("sign", "judge")
        place.mkdir(parents=True)
    try:
        yield str(place)
    except (UsageError, OSError):
        Folder(place).remove()
        raise
    Folder(place).remove()


def _finished(results: Iterable[Any]) -> None:
    for _ in results:
        pass


# The first pass


def _sign_guarded(cleaning: Cleaning, folder: Folder, number: int, file: ShardFile) -> dict[str, Any]:
    """Marks of an evaluation shard, for what comes too close to it."""
    keys, texts, hashes = [], [], []
    for entry in scan(file.local()):
        sample = parse_sample(entry.key, entry.read())
        keys.append(entry.key)
        texts.append(compared_text(sample))
        hashes.append([image_hash(open_image(image, name=f"sample {entry.key}")) for image in sample.images])
    cleaning.sign(cleaning.piece(number), texts, hashes)
    nothing = np.full(len(keys), "")
    Judged(np.array(keys), nothing, np.full(len(keys), np.nan)).save(cleaning.judged, cleaning.piece(number))
    return {"samples": len(keys)}


def _judge(cleaning: Cleaning, folder: Folder, number: int, file: ShardFile) -> dict[str, Any]:
    """Everything that a sample alone tells, of one shard."""
    keys, reasons = [], []
    texts: list[str | None] = []
    hashes: list[list[int]] = []
    agreement = Agreement(cleaning.rules.agreement.model)
    for entry in scan(file.local()):
        sample, pictures, reason = judge(entry, cleaning.rules)
        keys.append(entry.key)
        reasons.append(reason or "")
        # What is dropped already stands for no other.
        compared = sample if reason is None else None
        texts.append(compared_text(compared) if compared else None)
        hashes.append([image_hash(picture) for picture in pictures] if compared and cleaning.modes else [])
        agreement.add(compared, pictures)
    piece = cleaning.piece(cleaning.protected + number)
    cleaning.sign(piece, texts, hashes)
    Judged(np.array(keys), np.array(reasons), agreement.scores()).save(cleaning.judged, piece)
    return {"samples": len(keys)}


def judge(entry: Entry, rules: Rules) -> tuple[Sample | None, list[Image.Image], Reason | None]:
    """A sample with its texts cleaned, its pictures, and why to leave it out, if so; None where it can not be read."""
    try:
        parts, reason = cleaned_parts(entry.read(), rules)
        sample = parse_sample(entry.key, parts)
    except UsageError:
        return None, [], Reason.INVALID
    if reason is not None:
        return sample, [], reason
    try:
        pictures = [open_image(image) for image in sample.images]
    except UsageError:
        return sample, [], Reason.UNREADABLE
    return sample, pictures, next(filter(None, (clean_image.fault(picture, rules) for picture in pictures)), None)


def cleaned_parts(parts: Mapping[str, bytes], rules: Rules) -> tuple[dict[str, bytes], Reason | None]:
    """A sample's files with their texts cleaned, and the first reason to drop it. What has nothing to mend stays as it is."""
    stored = _object(parts["json"]) if "json" in parts else {}
    # As in `parse_sample`, the .txt part is the caption where the JSON has none, or null.
    told_beside = "txt" in parts and stored.get("caption") is None
    beside = {"caption": parts["txt"].decode("utf-8-sig", "replace").strip()} if told_beside else {}
    fields, reason = clean_fields(beside | stored | beside, rules)
    cleaned = dict(parts)
    if beside and fields["caption"] != beside["caption"]:
        cleaned["txt"] = fields["caption"].encode("utf-8", "surrogatepass")
    mended = {name: value if name in beside else fields[name] for name, value in stored.items()}
    if mended != stored:
        cleaned["json"] = json.dumps(mended, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return cleaned, reason


def _object(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise UsageError("its .json can not be read")
    return fields


def compared_text(sample: Sample) -> str | None:
    """What is compared of a sample's texts: everything it says."""
    return "\n".join(said(sample)) or None


# The second


def _agreement_limit(cleaning: Cleaning, pieces: Sequence[str]) -> float:
    """The agreement below which a sample is left out."""
    rules = cleaning.rules.agreement
    if rules.drop_lowest is None:
        return -np.inf if rules.threshold is None else rules.threshold
    scores = np.concatenate([cleaning.judgement(piece).agreement for piece in pieces])
    scores = np.sort(scores[~np.isnan(scores)])
    return float(scores[int(rules.drop_lowest * len(scores))]) if len(scores) else -np.inf


# The third


def _write(cleaning: Cleaning, limit: float, folder: Folder, number: int, file: ShardFile) -> dict[str, Any]:
    """One shard's samples to where they belong."""
    verdicts = _verdicts(cleaning, limit, cleaning.piece(cleaning.protected + number))
    counts: Counter[str] = Counter()
    examples: dict[str, list[int]] = {}
    with PieceWriter(folder, number) as kept, PieceWriter(Folder(join(folder.place, DROPPED)), number) as dropped:
        for index, entry in enumerate(scan(file.local())):
            if index not in verdicts:
                kept.write(entry.key, cleaned_parts(entry.read(), cleaning.rules)[0])
                continue
            reason, told = verdicts[index]
            examples.setdefault(reason, []).append(counts.total())
            counts[reason] += 1
            dropped.write(entry.key, _marked(entry.read(), told))
    return {
        "samples": sum(shard["samples"] for shard in kept.shards),
        "skipped": counts.total(),
        "shards": kept.shards,
        "dropped": dropped.shards,
        "reasons": dict(counts),
        "examples": {reason: places[:EXAMPLES] for reason, places in examples.items()},
    }


def _verdicts(cleaning: Cleaning, limit: float, piece: str) -> dict[int, tuple[str, dict[str, str]]]:
    """Of every sample of a piece that is left out, by its index: the reason, and what to write of it."""
    read = lru_cache(maxsize=64)(cleaning.judgement)  # duplicates name samples of a few pieces again and again
    verdicts, judged = {}, read(piece)
    for index, found in enumerate(judged.reasons):
        reason = str(found) or (str(Reason.DISAGREEMENT) if judged.agreement[index] < limit else "")
        if reason:
            told = {"dropped": reason}
            if not np.isnan(judged.agreement[index]):
                told["agreement"] = f"{judged.agreement[index]:.4f}"
            verdicts[index] = reason, told
    for mode in cleaning.modes:
        drops = dedup.dropped(cleaning.marks(mode), piece)
        for index, like, place, contaminated in zip(
            drops.index, drops.kept_piece, drops.kept_index, drops.contaminated, strict=True
        ):
            if contaminated or mode == cleaning.rules.duplicates.by:
                reason = str(Reason.CONTAMINATION if contaminated else Reason.DUPLICATE)
                key = str(read(cleaning.piece(int(like))).keys[int(place)])
                verdicts.setdefault(int(index), (reason, {"dropped": reason, "like": key}))
    return verdicts


def _marked(parts: Mapping[str, bytes], told: Mapping[str, str]) -> dict[str, bytes]:
    """A sample's files with what is told of it in the JSON; a JSON part that can not be read is kept beside."""
    parts = dict(parts)
    try:
        fields = _object(parts.get("json", b"{}"))
    except UsageError:
        fields, parts["unreadable"] = {}, parts["json"]
    return parts | {"json": json.dumps({**fields, **told}, ensure_ascii=False).encode("utf-8", "surrogatepass")}


def _index(place: str, done: Sequence[Mapping[str, Any]]) -> None:
    write_index(join(place, DROPPED), [shard for one in done for shard in one["dropped"]])
    write_index(place, [shard for one in done for shard in one["shards"]])


def _summary(source: str | Path, rules: Rules, done: Sequence[Mapping[str, Any]], dropped: Folder) -> Summary:
    reasons: Counter[str] = Counter()
    for one in done:
        reasons.update(one["reasons"])
    return Summary(
        source=str(source),
        kept=sum(one["samples"] for one in done),
        reasons=dict(reasons),
        examples=list(_examples(done, dropped)),
        rules=rules,
    )


def _examples(done: Sequence[Mapping[str, Any]], dropped: Folder) -> Iterator[Example]:
    """The first few samples left out for each reason."""
    shown: Counter[str] = Counter()
    for one in done:
        wanted = [(reason, place) for reason, places in one["examples"].items() for place in places]
        wanted = [(reason, place) for reason, place in wanted if shown[reason] < EXAMPLES]
        if not wanted:
            continue
        shard = Shards([ShardFile(join(dropped.place, line["file"]), line["samples"]) for line in one["dropped"]])
        for reason, place in wanted:
            if shown[reason] < EXAMPLES:
                shown[reason] += 1
                yield _example(reason, shard.entry(place))


def _example(reason: str, entry: Entry) -> Example:
    parts = entry.read()
    try:
        sample = parse_sample(entry.key, parts)
    except UsageError:
        return Example(reason, entry.key, "", None)
    return Example(reason, entry.key, compared_text(sample) or "", sample.images[0] if sample.images else None)
