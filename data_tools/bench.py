"""`vlm bench data`: how fast data is converted and read, beside the plainest program that does the same work.

Knows what to measure and against what. Knows nothing of how it is done: it calls what a user calls.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from pathlib import Path

import numpy as np
from PIL import Image

from vlm.benchmark import Row, interleaved, seconds
from vlm.errors import UsageError
from vlm.images import open_image
from vlm.shards import Shards, ShardWriter

from .bench_convert import bench_convert
from .bench_dedup import bench_dedup
from .bench_memory import bench_memory
from .clean import DROPPED, clean
from .clean_rules import load_rules
from .convert import convert

SIDE, RESIZED = 384, 224  # pixels
PICTURES = 500  # that differ; more samples show them again


def bench_data(
    against: str | None = None,
    samples: int = 5000,
    rounds: int = 3,
    model: str | None = None,
    data: str | None = None,
) -> list[Row]:
    """Data tools beside the plainest program that does the same work, or beside what is known of made-up data.

    against: "copy", "pil" or "webdataset": generated JPEG pictures, `samples` of them, are converted or read, measured
    `rounds` times in turns; None: these three. "memory": each tool on few and on many texts. "dedup": made-up captions
    with known duplicates. "swapped": pairs of the shards `data`, one caption in ten another's, judged by `model`.
    Raises UsageError for another name, and for what "swapped" lacks.
    """
    timed = {"copy": _bench_copy, "pil": _bench_pil, "webdataset": _bench_webdataset}
    if against == "memory":
        return bench_memory()
    if against == "dedup":
        return bench_dedup()
    if against == "swapped":
        if model is None or data is None:
            raise UsageError("swapped captions need a model and pairs; give --model MODEL --data SHARDS")
        return bench_agreement(model, data)
    if against not in (None, *timed):
        raise UsageError(
            f"there is no {against} to measure against; use one of {', '.join(timed)}, memory, dedup, swapped"
        )
    with tempfile.TemporaryDirectory(prefix="vlm-bench-") as folder:
        source = _make_pairs(Path(folder), samples)
        convert(source, Path(folder, "shards"), images=Path(folder, "pictures"))
        return [row for name, bench in timed.items() if against in (None, name) for row in bench(Path(folder), rounds)]


def _make_pairs(folder: Path, samples: int) -> Path:
    """Pictures of about 50 kB, and a file of pairs that shows each several times."""
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for number in range(PICTURES):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((SIDE, SIDE))
        pixels = np.asarray(coarse) + rng.integers(-12, 12, (SIDE, SIDE, 3))
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        picture.save(folder / "pictures" / f"{number}.jpg", quality=90)
    lines = ({"image": f"{n % PICTURES}.jpg", "caption": f"picture {n} of the benchmark"} for n in range(samples))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "pairs.jsonl"


def _bench_copy(folder: Path, rounds: int) -> list[Row]:
    """Against processes that read every picture and write its bytes to disk."""
    return bench_convert(folder / "pairs.jsonl", folder / "pictures", rounds)


# Reading


def _bench_pil(folder: Path, rounds: int) -> list[Row]:
    """Against Pillow alone, on bytes that are in memory already."""
    shards = Shards.open(folder / "shards")
    count = min(len(shards), 1000)
    encoded = [shards[index].images[0] for index in range(count)]
    ours = partial(_rate, count, lambda: [_ours(shards, index) for index in range(count)])
    peer = partial(_rate, count, lambda: [_resized(Image.open(io.BytesIO(data)).convert("RGB")) for data in encoded])
    conditions = f"1 process, JPEG {SIDE}² decoded and resized to {RESIZED}²; peer: Pillow on bytes in memory"
    return [Row("read from shards", *interleaved(ours, peer, rounds), "images/s", conditions, "ratio ≥ 0.9")]


def _bench_webdataset(folder: Path, rounds: int) -> list[Row]:
    """Against a plain pipeline of webdataset over the same shards."""
    import webdataset

    shards = Shards.open(folder / "shards")
    tars = [file.place for file in shards.files]
    count = min(len(shards), 1000)

    def theirs() -> Iterator[object]:
        samples = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).decode("pil")
        return (_resized(picture) for picture, _ in samples.to_tuple("jpg", "json"))

    ours = partial(_rate, count, lambda: [_ours(shards, index) for index in range(count)])
    peer = partial(_rate, count, lambda: [next(stream) for stream in repeat(theirs(), count)])
    conditions = f"1 process, picture and JSON, resized to {RESIZED}²; peer: WebDataset(…).decode('pil')"
    return [Row("read from shards", *interleaved(ours, peer, rounds), "images/s", conditions, "ratio > 1")]


def _ours(shards: Shards, index: int) -> np.ndarray:
    return _resized(open_image(shards[index].images[0]))


def _resized(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.resize((RESIZED, RESIZED), Image.Resampling.BICUBIC))


def _rate(samples: int, work: Callable[[], object]) -> float:
    return samples / seconds(work)


# Agreement


SWAPPED = 0.1  # of the pairs


def bench_agreement(model: str, data: str) -> list[Row]:
    """Swap captions among some pairs of the shards `data`, and let the filter drop as many pairs as were swapped."""
    with tempfile.TemporaryDirectory(prefix="vlm-bench-") as folder:
        swapped = _swap_captions(Shards.open(data), Path(folder, "swapped"))
        settings = [f"agreement.model={model}", f"agreement.drop_lowest={SWAPPED}", "duplicates.by=none"]
        clean(Path(folder, "swapped"), Path(folder, "clean"), load_rules(None, settings))
        dropped = set(Shards.open(Path(folder, "clean", DROPPED)).keys)
        kept = set(Shards.open(Path(folder, "clean")).keys)
    good = (dropped | kept) - swapped
    conditions = f"{len(good) + len(swapped)} pairs, {len(swapped)} swapped, as many dropped"
    return [
        Row(
            "agreement: swapped captions found",
            100 * len(dropped & swapped) / len(swapped),
            None,
            "%",
            conditions,
            "≥ 95",
        ),
        Row("agreement: good pairs dropped", 100 * len(dropped & good) / len(good), None, "%", conditions, "≤ 2"),
    ]


def _swap_captions(shards: Shards, out: Path) -> set[str]:
    """Write the pairs with every so many-th caption given to the next of these; the keys whose caption is another's now."""
    pairs = [(entry.key, entry.read()) for entry in shards.entries]
    fields = [json.loads(parts["json"]) for _, parts in pairs]
    order = np.random.default_rng(0).permutation(len(pairs))
    chosen = [int(place) for place in order[: int(SWAPPED * len(pairs))]]
    given = dict(zip(chosen, [*chosen[1:], chosen[0]], strict=True))
    with ShardWriter(out) as writer:
        for place, (key, parts) in enumerate(pairs):
            caption = fields[given.get(place, place)]["caption"]
            writer.write(key, parts | {"json": json.dumps({"caption": caption}).encode()})
    return {pairs[place][0] for place in chosen if fields[place]["caption"] != fields[given[place]]["caption"]}
