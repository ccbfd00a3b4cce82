"""Samples once more in other words: which of a sample's texts may be reworded, and how the new sample is marked.

Knows captions, questions, answers and the JSON fields of an augmented sample. Knows nothing of how words are found, see
`synonyms` and `back_translation`, nor of who works on which shard.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Protocol

from vlm.errors import RunError, UsageError
from vlm.samples import SampleError, parse_sample
from vlm.shards import ShardFile, Shards, scan, write_index
from vlm.storage import Folder
from vlm.wording import words

from .engines import LocalEngine
from .job import Engine, PieceWriter, job
from .synonyms import replace_words, thesauri

WINDOW = 64  # samples that are in memory at once, and that a translation model sees together

Versions = list[list[str]]  # for each version of a sample, its texts


@dataclass(frozen=True)
class Texts:
    """What of one sample may be said otherwise, and which words, in lower case, must stay: all that its answers have."""

    key: str
    texts: tuple[str, ...]
    keep: frozenset[str]


class Rewording(Protocol):
    """A way of saying things otherwise. name: what marks its samples. suffix: what its keys end in, before a number."""

    name: str
    suffix: str

    def __call__(self, samples: Sequence[Texts], counts: Counter[str]) -> list[Versions]:
        """Versions of each sample's texts, a text as it was where it cannot be reworded; reasons go into `counts`."""


@dataclass(frozen=True)
class Synonyms:
    """Words replaced by others that say the same, drawn by the seed and the sample's key.

    share: most of a text's words that are replaced. copies: versions of a sample, where its words allow as many. wordnet:
    WordNet too, whose data must then be installed wherever this runs.
    """

    seed: int = 0
    share: float = 0.3
    copies: int = 1
    wordnet: bool = False
    name = "synonyms"
    suffix = "syn"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError(f"share is {self.share:g} of the words; give more than 0, at most 1")
        if self.copies < 1:
            raise UsageError(f"copies is {self.copies}; make at least 1")

    def __call__(self, samples: Sequence[Texts], counts: Counter[str]) -> list[Versions]:
        """As `Rewording`. Raises RunError where WordNet is asked for and not installed."""
        return [[self._version(sample, number) for number in range(1, self.copies + 1)] for sample in samples]

    def _version(self, sample: Texts, number: int) -> list[str]:
        try:
            sources = thesauri(self.wordnet)
        except (ImportError, LookupError):
            mend = "pip install nltk, python -m nltk.downloader wordnet, or go without"
            raise RunError(f"WordNet: nltk or its data are not here; {mend}") from None
        rng = Random(f"{self.seed} {sample.key} {number}")
        return [replace_words(text, sources, rng, self.share, sample.keep) for text in sample.texts]


def augment(source: str | Path, out: str | Path, rewording: Rewording, engine: Engine | None = None) -> Counter[str]:
    """Write the samples of the shards `source`, each followed by its reworded versions, into the new folder `out`.

    Returns what `augmented` counts. The bytes do not depend on the engine; killed and started again it goes on where it was.
    """
    files = Shards.open(source).files
    settings = {"augment": [asdict(file) for file in files], "rewording": repr(rewording)}
    counts: Counter[str] = Counter()
    with job(out, settings, engine or LocalEngine()) as work:
        total = sum(file.samples for file in files)
        done = list(work.run("augment", partial(_augment_piece, rewording), files, total))
        write_index(work.folder.place, [shard for one in done for shard in one["shards"]])
    for one in done:
        counts.update(one["counts"])
    return counts


def _augment_piece(rewording: Rewording, folder: Folder, number: int, file: ShardFile) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    with PieceWriter(folder, number) as writer:
        for key, parts in augmented(file.local(), rewording, counts):
            writer.write(key, parts)
    return {"samples": counts["originals"], "shards": writer.shards, "counts": counts}


def augmented(tar: Path, rewording: Rewording, counts: Counter[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and parts of every sample of a shard as it was, each followed by its reworded versions.

    A version is the sample with other words in its caption, its questions or its text, answers and pictures untouched, the
    key `KEY-syn1` and two JSON fields more, `"augmented": "synonyms"` and `"original": KEY`. Conversations stay as they are,
    and so do blocks of documents, whose places are counted in characters. Added to `counts`: originals, augmented,
    unchanged (nothing could be reworded), already_augmented, unreadable. Raises UsageError for a damaged shard, and for
    one that has such a version of a sample already.
    """
    entries, made = scan(tar), set[str]()
    while window := list(islice(entries, WINDOW)):
        stored = [(entry.key, entry.read()) for entry in window]
        told = [_texts(key, parts, counts) for key, parts in stored]
        versions = dict(
            zip((one.key for one in told if one), rewording([one for one in told if one], counts), strict=True)
        )
        for key, parts in stored:
            if key in made:
                mend = "augment the original shards, synonyms with --copies N"
                raise UsageError(f"sample {key}: already augmented with {rewording.name}; {mend}")
            counts["originals"] += 1
            yield key, parts
            if key in versions:
                new = dict(_new_samples(key, parts, versions[key], rewording, counts))
                made |= set(new)
                yield from new.items()


def _new_samples(
    key: str, parts: Mapping[str, bytes], versions: Versions, rewording: Rewording, counts: Counter[str]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    places = _places(parts)
    seen = [[text for _, text in places]]
    for texts in versions:
        if texts not in seen:
            marks = {"augmented": rewording.name, "original": key}
            yield (
                f"{key}-{rewording.suffix}{len(seen)}",
                _with_texts(parts, [place for place, _ in places], texts, marks),
            )
            seen.append(texts)
    counts["augmented"] += len(seen) - 1
    counts["unchanged"] += len(seen) == 1


def _texts(key: str, parts: Mapping[str, bytes], counts: Counter[str]) -> Texts | None:
    """What of a sample may be reworded; None where nothing may."""
    try:
        sample = parse_sample(key, parts)
    except SampleError:
        counts["unreadable"] += 1
        return None
    if "augmented" in sample.extra:
        counts["already_augmented"] += 1
        return None
    answers = [answer for question in sample.questions for answer in question.answers]
    keep = frozenset(match[0].lower() for answer in answers for match in words(answer))
    texts = tuple(text for _, text in _places(parts))
    return Texts(key, texts, keep) if texts else None


def _places(parts: Mapping[str, bytes]) -> list[tuple[tuple[str | int, ...], str]]:
    """The texts of a readable sample that may be reworded, and where in its fields they stand; `txt` is the part."""
    fields = _fields(parts)
    places: list[tuple[str | int, ...]] = [("caption",), ("question",)]
    places += [("captions", number) for number in range(len(fields.get("captions") or []))]
    places += [("qa", number, "question") for number in range(len(fields.get("qa") or []))]
    places += [] if "documents" in fields else [("text",)]
    found = [(place, text) for place in places if isinstance(text := _at(fields, place), str) and text.strip()]
    if "txt" in parts and fields.get("caption") is None:
        found.append((("txt",), parts["txt"].decode("utf-8-sig")))
    return found


def _with_texts(
    parts: Mapping[str, bytes], places: Iterable[tuple[str | int, ...]], texts: Iterable[str], marks: Mapping[str, str]
) -> dict[str, bytes]:
    """The parts of a sample with other texts in some places, and marked."""
    fields, changed = _fields(parts) | dict(marks), dict(parts)
    for place, text in zip(places, texts, strict=True):
        if place == ("txt",):
            changed["txt"] = text.encode()
        else:
            _at(fields, place[:-1])[place[-1]] = text
    if fields.get("caption") is not None:
        # The part would say the old caption still, and the field goes before it.
        changed.pop("txt", None)
    return changed | {"json": json.dumps(fields, ensure_ascii=False).encode("utf-8", "surrogatepass")}


def _fields(parts: Mapping[str, bytes]) -> dict[str, Any]:
    return json.loads(parts["json"].decode("utf-8-sig")) if "json" in parts else {}


def _at(fields: Any, place: Iterable[str | int]) -> Any:
    for step in place:
        fields = fields.get(step) if isinstance(fields, dict) else fields[step]
    return fields
