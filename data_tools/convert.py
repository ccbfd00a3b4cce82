"""Other people's files into shards.

Knows how rows of a source become shards on several cores, and what to do with those that can not be used. Knows nothing
of any one format or of training. Images are copied byte for byte, once they are found to be whole.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from vlm.errors import UsageError
from vlm.images import check_image, extension_of
from vlm.samples import Sample, SampleError, make_sample
from vlm.shards import write_index
from vlm.storage import Folder, join

from .engines import LocalEngine
from .job import STATE, Engine, PieceWriter, job
from .sources import Record, Skipped, Source, open_source

SKIPPED = "skipped.jsonl"
_JSON = json.JSONEncoder(ensure_ascii=False)
PATIENCE = 1000  # samples in a row, from the first, of which none can be used: it is the source and not the sample


@dataclass(frozen=True)
class Converted:
    """What a conversion left: samples in shards, and samples that could not be used, each with a line of skipped.jsonl."""

    samples: int
    skipped: int


def convert(
    src: str | Path,
    out: str | Path,
    format: str = "jsonl",
    images: str | Path | None = None,
    *,
    samples_per_shard: int = 1000,
    shard_bytes: int | None = None,
    max_skipped: float = 0.1,
    engine: Engine | None = None,
    **options: Any,
) -> Converted:
    """Write the samples of `src` as shards into the new folder `out`, a path or an address.

    images: the folder that image paths start from; by default the source's own. A shard holds so many rows of the source,
    and at most `shard_bytes`. options: those of the format. Samples that can not be used are left out and named in
    OUT/skipped.jsonl; if they are more than the share `max_skipped`, UsageError names the first and nothing is left.
    Killed and started again with the same arguments it goes on where it was; the bytes do not depend on that, nor on the
    engine.
    """
    _check_limits(samples_per_shard, shard_bytes, max_skipped)
    source = open_source(format, Path(src), Path(images) if images is not None else None, **options)
    rows_per_piece = 1 if source.whole_shards else samples_per_shard
    settings = _settings(source, format, rows_per_piece, shard_bytes)
    with job(out, settings, engine or LocalEngine()) as work, tempfile.TemporaryDirectory() as scratch:
        pieces = _batched(source.rows(Path(scratch)), rows_per_piece)
        done = work.run("convert", partial(_convert_piece, source, shard_bytes), pieces, source.count())
        results = list(_usable(done, max_skipped))
        counts = Converted(sum(one["samples"] for one in results), sum(one["skipped"] for one in results))
        if not counts.samples:
            raise UsageError(f"{source.src}: no samples; {source.empty}")
        _gather_skipped(work.folder, work.scratch("skipped"))
        write_index(work.folder.place, [shard for one in results for shard in one["shards"]])
    return counts


def _check_limits(samples_per_shard: int, shard_bytes: int | None, max_skipped: float) -> None:
    if samples_per_shard < 1:
        raise UsageError(f"{samples_per_shard} samples per shard; give at least 1")
    if shard_bytes is not None and shard_bytes < 1:
        raise UsageError(f"{shard_bytes} bytes per shard; give at least 1")
    if not 0 <= max_skipped <= 1:
        raise UsageError(f"max_skipped is {max_skipped:g} of the samples; give 0 to 1")


def _settings(source: Source, format: str, rows_per_piece: int, shard_bytes: int | None) -> dict[str, Any]:
    """What the output depends on: an unfinished one of other settings, or of a source since changed, is not gone on with."""
    stat = source.src.stat()
    told = {name: str(value) for name, value in sorted(vars(source).items())}
    return {
        "format": format,
        "source": told,
        "size": stat.st_size,
        "changed": stat.st_mtime_ns,
        "shards": [rows_per_piece, shard_bytes],
    }


def _usable(results: Iterable[dict[str, Any]], max_skipped: float) -> Iterator[dict[str, Any]]:
    """The results, as long as not too many samples had to be skipped."""
    samples = skipped = 0
    first = None
    for result in results:
        samples, skipped = samples + result["samples"], skipped + result["skipped"]
        first = first or result["first"]
        if not samples and skipped >= PATIENCE:
            break
        yield result
    total = samples + skipped
    if skipped > max_skipped * total:
        raise UsageError(
            f"{first} ({skipped} of {total} samples can not be used, and {max_skipped:.0%} may; mend them or raise "
            "--max-skipped)"
        )


def _convert_piece(
    source: Source, shard_bytes: int | None, folder: Folder, number: int, rows: Sequence[Any]
) -> dict[str, Any]:
    """Some rows into a shard, and a file of those that could not be used."""
    faults: list[Skipped] = []
    with PieceWriter(folder, number, shard_bytes) as writer:
        for record in _records(source, rows, faults):
            try:
                writer.write(record.key, _parts(record))
            except UsageError as error:
                faults.append(Skipped(str(error)))
    if faults:
        with Folder(join(folder.place, f"{STATE}/skipped")).write(f"{number:05d}.jsonl") as file:
            file.writelines((json.dumps(asdict(fault), ensure_ascii=False) + "\n").encode() for fault in faults)
    samples = sum(shard["samples"] for shard in writer.shards)
    return {
        "shards": writer.shards,
        "samples": samples,
        "skipped": sum(fault.samples for fault in faults),
        "first": next((fault.reason for fault in faults if fault.samples), None),
    }


def _records(source: Source, rows: Sequence[Any], faults: list[Skipped]) -> Iterator[Record]:
    """The rows' samples; what can not be used is added to `faults`."""
    for row in rows:
        try:
            for found in [row] if isinstance(row, Skipped) else source.records(row):
                if isinstance(found, Skipped):
                    faults.append(found)
                else:
                    yield found
        except UsageError as error:
            faults.append(Skipped(str(error)))


def _parts(record: Record) -> dict[str, bytes]:
    """The sample's files. Several images are numbered in their order."""
    parts: dict[str, bytes] = {}
    for number, image in enumerate(record.images):
        data = _image_bytes(record.place, image)
        extension = extension_of(data)
        parts[extension if len(record.images) == 1 else f"{number}.{extension}"] = data
    try:
        _check_shown(make_sample(record.key, record.fields, tuple(parts.values())))
    except SampleError as error:
        raise UsageError(f"{record.place}: {error}") from None
    parts["json"] = _JSON.encode(record.fields).encode("utf-8", "surrogatepass")
    return parts


def _check_shown(sample: Sample) -> None:
    """Raise SampleError for a conversation that leaves out a picture: no word of it would be learnt from that one."""
    places = sum(part["type"] == "image" for message in sample.messages for part in message["content"])
    if sample.messages and places < len(sample.images):
        raise SampleError(
            f"sample {sample.key}: messages have {places} image places for {len(sample.images)} images; "
            'write one {"type": "image"} for each image'
        )


def _image_bytes(place: str, image: str | bytes) -> bytes:
    name = "its image" if isinstance(image, bytes) else f"image {image}"
    try:
        data = image if isinstance(image, bytes) else _read(image)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{place}: {name}: {reason}; check the path or give --images") from None
    try:
        check_image(data, name=name)
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from None
    return data


def _read(path: str) -> bytes:
    """A file's bytes, without the file object that `open` makes: for a small file it takes as long as reading."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(handle).st_size
        data = os.read(handle, size)
        while len(data) < size and (more := os.read(handle, size - len(data))):
            data += more
        return data
    finally:
        os.close(handle)


def _gather_skipped(folder: Folder, pieces: Folder) -> None:
    """The pieces' files of skipped samples as one, where there are any."""
    names = pieces.names()
    if names:
        with folder.write(SKIPPED) as file:
            for name in names:
                file.write(pieces.read(name) or b"")


def _batched(rows: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(islice(rows, size)):
        yield batch
