"""Converting beside programs that merely copy the same pictures: large ones and small ones, by the clock and by the core.

Knows what the plainest copy does. Knows nothing of how `convert` does it.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median

from vlm.benchmark import Row, seconds
from vlm.machine import usable_cores
from vlm.shards import Shards

from .convert import convert
from .engines import LocalEngine
from .scenes import generate_scenes

PIECE = 1000  # pictures in an output file, as in a shard


def bench_convert(pairs: Path, pictures: Path, rounds: int) -> list[Row]:
    """The JPEGs `pictures` that the lines of `pairs` show, then as many generated scenes; each `rounds` times in turns."""
    scenes = _make_scenes(pairs.parent, sum(1 for _ in open(pairs)))
    return [row for source, folder in ((pairs, pictures), scenes) for row in _compare(source, folder, rounds)]


def _make_scenes(folder: Path, samples: int) -> tuple[Path, Path]:
    """The generated pictures as files, and a file of pairs that shows each once."""
    generate_scenes(folder / "scenes", train=samples, val=1, test=1)
    pictures = folder / "small"
    pictures.mkdir()
    with open(folder / "small.jsonl", "w") as file:
        for sample in Shards.open(folder / "scenes" / "train"):
            (pictures / f"{sample.key}.png").write_bytes(sample.images[0])
            file.write(json.dumps({"image": f"{sample.key}.png", "caption": sample.caption}) + "\n")
    return folder / "small.jsonl", pictures


def _compare(pairs: Path, pictures: Path, rounds: int) -> list[Row]:
    """Against a copy and against a copy that hashes too, which conversion can not help, as the index holds the sha256.

    The last row is the second of these against the first: what conversion can reach of a copy where the disk is no limit
    and it takes no time for anything but the bytes.
    """
    names = [json.loads(line)["image"] for line in open(pairs)]
    made = (pairs.parent / f"made{number}" for number in count())
    programs: list[Callable[[Path], object]] = [
        lambda out: convert(pairs, out, images=pictures),
        partial(_copy_all, pictures, names, False),
        partial(_copy_all, pictures, names, True),
    ]
    turns = [[_measured(program, made) for program in programs] for _ in range(rounds)]
    (ours, core), (copied, copied_core), (hashed, _) = (
        [median(one) for one in zip(*runs, strict=True)] for runs in zip(*turns, strict=True)
    )
    samples = len(names)
    held = f"{samples} {_kind(pictures)}, {usable_cores()} processes"
    copying, hashing = "peer: read the files and write their bytes", "peer: read, hash and write the bytes"
    return [
        Row("convert jsonl", samples / ours, samples / copied, "samples/s", f"{held}; {copying}", "ratio ≥ 0.9"),
        Row("convert jsonl", samples / ours, samples / hashed, "samples/s", f"{held}; {hashing}"),
        Row("read, hash and write", samples / hashed, samples / copied, "samples/s", f"{held}; {copying}", "the limit"),
        Row(
            "convert jsonl, of a core",
            1e6 * core / samples,
            1e6 * copied_core / samples,
            "µs/sample",
            f"{held}; {copying}",
            less_is_better=True,
        ),
    ]


def _measured(program: Callable[[Path], object], made: Iterator[Path]) -> tuple[float, float]:
    """Seconds by the clock and seconds of a core that a program takes to fill a new folder, which is removed."""
    out = next(made)
    before = _core_seconds()
    taken = seconds(partial(program, out))
    used = _core_seconds() - before
    shutil.rmtree(out)
    return taken, used


def _core_seconds() -> float:
    """Of this process and of all its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _copy_all(pictures: Path, names: list[str], hashed: bool, out: Path) -> None:
    """Every file opened, read and appended to one of as many output files as there are shards, which are on disk then."""
    out.mkdir()
    pieces = [names[start : start + PIECE] for start in range(0, len(names), PIECE)]
    list(LocalEngine().map(partial(_copy, f"{pictures}/", out, hashed), enumerate(pieces)))


def _copy(pictures: str, out: Path, hashed: bool, numbered: tuple[int, list[str]]) -> None:
    number, names = numbered
    digest = hashlib.sha256()
    with open(out / str(number), "wb") as file:
        for name in names:
            with open(pictures + name, "rb", buffering=0) as picture:
                data = picture.read()
            file.write(data)
            if hashed:
                digest.update(data)
        file.flush()
        os.fsync(file.fileno())


def _kind(folder: Path) -> str:
    paths = list(folder.iterdir())
    kilobytes = sum(path.stat().st_size for path in paths) / len(paths) / 1000
    kind = {".jpg": "JPEG", ".png": "PNG"}[paths[0].suffix]
    return f"{kind}s of {kilobytes:.0f} kB"
