"""How fast, how exact and how large: the search for near-duplicates on captions made up for it.

Knows a grammar of captions, edits whose similarity it counts itself, and how to watch processes. Knows nothing of how
duplicates are found.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vlm.benchmark import Row

from .dedup import Rules, dropped, find_duplicates, sign

PIECE = 10_000
REPEATED = 0.1  # the share of samples that repeat one of POPULAR, half of them with a word put in
POPULAR = 20_000
COLOURS = "red blue green yellow black white brown grey orange purple pink".split()
SIZES = "small large tall little huge old young tiny wide broken empty wooden metal striped spotted shiny".split()
NOUNS = (
    "man woman boy girl dog cat horse cow sheep bird elephant bear zebra giraffe bus train truck car bicycle motorcycle boat "
    "plane bench chair table sofa bed lamp clock vase bottle cup fork knife spoon bowl plate banana apple sandwich pizza cake "
    "carrot kite ball bat glove skateboard surfboard racket umbrella handbag tie suitcase frisbee skis snowboard laptop mouse "
    "keyboard phone oven sink fridge book scissors toothbrush tower bridge statue fountain church house tree flower hill"
).split()
DOING = (
    "standing sitting lying running walking riding holding eating drinking watching jumping sleeping waiting playing "
    "leaning flying resting looking smiling turning"
).split()
WHERE = "on under beside behind near above below inside against across".split()
PLACES = (
    "street beach kitchen field park room station harbour market forest river mountain garden office airport stadium "
    "bathroom restaurant farm library museum square road lake"
).split()
TIMES = ("", "", "", "at night", "at sunset", "in the morning", "on a rainy day", "in winter", "during the game")
SYLLABLES = "ka lo mi ren ta vo su bel dor fin gar hal ist jon kel mar nor pol ras tem ul van wes xan yor zim".split()


def bench_dedup(sizes: Sequence[int] = (100_000, 300_000, 1_000_000), processes: int = 2) -> list[Row]:
    """Rows of the benchmark: time and peak memory at every size, how they grow, recall and false drops.

    Memory is the sum over this process and its workers of what each has resident; pages they share count each time.
    """
    rows = _exactness_rows()
    runs = []
    for size in sizes:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            seconds, work, peak, idle, drops = _timed(
                size, pool, [child.pid for child in multiprocessing.active_children()]
            )
        runs.append((size, work, peak))
        held = f"{size:,} captions of 6 to 20 words, {drops:,} dropped; by text at 0.8; {processes} processes"
        rows.append(Row(f"dedup {size:,}: time, marks included", seconds, None, "s", held, f"≤ {300 * size // 10**6}"))
        held += f"; {idle:.2f} GiB before it starts"
        rows.append(Row(f"dedup {size:,}: peak memory", peak, None, "GiB", held, "≤ 4"))
    (few, fast, low), (many, slow, high) = runs[0], runs[-1]
    grown = f"from {few:,} to {many:,} captions"
    rows.append(Row("dedup: growth of processor time a sample", slow / many / (fast / few), None, "×", grown, "≈ 1"))
    few, _, low = runs[-2] if len(runs) > 1 else runs[0]  # where the small fill less than one chunk
    grown = f"from {few:,} to {many:,} captions"
    more = (high - low) * 2**30 / max(many - few, 1)
    rows.append(Row("dedup: growth of memory", more, None, "bytes a sample", grown, "≤ 100"))
    return rows


def captions(number: int, seed: int | Sequence[int]) -> list[str]:
    """Captions of a seeded grammar: things, colours, places, and names that are rare."""
    rng = np.random.default_rng(seed)

    def some(choices: Sequence[str], often: float = 1.0) -> list[str]:
        chosen = np.array(choices)[rng.integers(len(choices), size=number)]
        return np.where(rng.random(number) < often, chosen, "").tolist()

    names = ["".join(parts) for parts in zip(*(some(SYLLABLES) for _ in range(3)), strict=True)]
    credit = [f"by {name}" if shown else "" for name, shown in zip(names, rng.random(number) < 0.3, strict=True)]
    parts = (
        some(["a", "the", "one", "a photo of a", "close up of a"]),
        *(some(SIZES, 0.6), some(COLOURS, 0.7), some(NOUNS), some(DOING), some(WHERE), some(["a", "the", "another"])),
        *(some(SIZES, 0.4), some(COLOURS, 0.7), some(NOUNS), some([f"in the {place}" for place in PLACES], 0.7)),
        *(some(TIMES), credit),
    )
    return [" ".join(word for word in row if word) for row in zip(*parts, strict=True)]


def labelled(groups: int, seed: int) -> tuple[list[str], dict[int, int], dict[int, int], dict[int, int]]:
    """Texts of 9 to 25 words; and by number, each with the one that it was made from, those that are near it (0.8 to 1,
    most of them just above), those that are not (0.3 to 0.6), and those in which two colours changed places.
    """
    rng = np.random.default_rng(seed)
    bases = [f"{text} {more}" for text, more in zip(captions(groups, seed), captions(groups, seed + 1), strict=True)]
    texts: list[str] = []
    near: dict[int, int] = {}
    far: dict[int, int] = {}
    swapped: dict[int, int] = {}
    for text in bases:
        words = text.split()[: rng.integers(9, 26)]
        base = len(texts)
        texts.append(" ".join(words))
        edits = (near, _edited(words, 0.8, 1, rng)), (far, _edited(words, 0.3, 0.6, rng)), (swapped, _swapped(words))
        for labels, edited in edits:
            if edited:
                labels[len(texts)] = base
                texts.append(" ".join(edited))
    return texts, near, far, swapped


class Peak:
    """The most that some processes had resident at once, so far."""

    gib = 0.0


@contextmanager
def peak_of(workers: Sequence[int | None]) -> Iterator[Peak]:
    """Watch this process and `workers`, by their ids, during the block."""
    peak = Peak()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak.gib = max(peak.gib, _resident_gib(workers))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak.gib = max(peak.gib, _resident_gib(workers))


def _exactness_rows() -> list[Row]:
    texts, near, far, swapped = labelled(20_000, seed=11)
    rules = Rules("text")
    with tempfile.TemporaryDirectory() as folder:
        sign(texts, [()] * len(texts), rules).save(folder, "all")
        find_duplicates(folder, ["all"], rules)
        found = set(dropped(folder, "all").index.tolist())
    edge = [twin for twin, base in near.items() if _similarity(texts[twin].split(), texts[base].split()) < 0.82]
    words = "of 9 to 25 words"
    cases = [
        ("recall of near-duplicates", list(near), "≥ 95", f"pairs at 0.8 and above, {words}"),
        ("recall at the threshold", edge, "≥ 95", f"pairs at 0.80 to 0.82, {words}"),
        ("false drops", [*far, *swapped], "≤ 0.5", f"pairs below 0.6 or with two colours exchanged, {words}"),
    ]
    for least, most in ((9, 12), (13, 18), (19, 25)):
        some = [twin for twin in swapped if least <= len(texts[twin].split()) <= most]
        held = f"pairs with two colours exchanged, of {least} to {most} words"
        cases.append((f"false drops, {least} to {most} words", some, "≤ 0.5", held))
    rows = []
    for name, twins, target, held in cases:
        share = sum(twin in found for twin in twins) / len(twins)
        rows.append(Row(f"dedup: {name}", 100 * share, None, "%", f"{len(twins):,} {held}", target))
    return rows


def _timed(size: int, pool: Any, workers: Sequence[int | None]) -> tuple[float, float, float, float, int]:
    """Seconds by the clock and of all processors, GiB at the peak and before, and how many were dropped."""
    rules = Rules("text")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pieces = [f"{number:05d}" for number in range(-(-size // PIECE))]
        pool.map(partial(_write_captions, folder, size), pieces)
        idle = _resident_gib(workers)
        with peak_of(workers) as peak:
            start, used = time.perf_counter(), _processor_seconds(workers)
            for _ in pool.imap(partial(_sign, folder, rules), pieces):
                pass
            find_duplicates(folder, pieces, rules, map=pool.imap)
            seconds, work = time.perf_counter() - start, _processor_seconds(workers) - used
        return seconds, work, peak.gib, idle, sum(len(dropped(folder, piece).index) for piece in pieces)


def _write_captions(folder: Path, size: int, piece: str) -> None:
    number = min(PIECE, size - int(piece) * PIECE)
    rng = np.random.default_rng([2, int(piece)])
    texts = captions(number, [1, int(piece)])
    popular = captions(POPULAR, 0)
    for place in np.flatnonzero(rng.random(number) < REPEATED).tolist():
        found = popular[rng.integers(POPULAR)].split()
        if rng.random() < 0.5:
            found.insert(rng.integers(len(found) + 1), "very")
        texts[place] = " ".join(found)
    (folder / f"{piece}.txt").write_text("\n".join(texts))


def _sign(folder: Path, rules: Rules, piece: str) -> None:
    texts = (folder / f"{piece}.txt").read_text().split("\n")
    sign(texts, [()] * len(texts), rules).save(folder, piece)


def _idle(_: int) -> None:
    time.sleep(0.1)


def _edited(words: list[str], lowest: float, highest: float, rng: np.random.Generator) -> list[str] | None:
    """Edit word by word until the similarity is in range, or None if it went past it."""
    now = list(words)
    for _ in range(30):
        place = int(rng.integers(len(now)))
        edit = rng.integers(3)
        replacement = [str(rng.choice(NOUNS + COLOURS + SIZES))]
        now[place : place + int(edit != 0)] = [] if edit == 1 and len(now) > 3 else replacement
        similarity = _similarity(words, now)
        if similarity < lowest:
            return None
        if similarity < highest and (similarity < lowest + 0.06 or rng.random() < 0.5):
            return now
    return None


def _swapped(words: list[str]) -> list[str] | None:
    places = [place for place, word in enumerate(words) if word in COLOURS]
    if len(places) < 2 or words[places[0]] == words[places[1]]:
        return None
    now = list(words)
    now[places[0]], now[places[1]] = now[places[1]], now[places[0]]
    return now


def _similarity(one: list[str], other: list[str]) -> float:
    left, right = _grams(one), _grams(other)
    return len(left & right) / len(left | right)


def _grams(words: list[str]) -> set[Any]:
    edged = ["^", *words, "$"]
    return {*words, *pairwise(edged), *zip(edged, edged[1:], edged[2:], strict=False)}


def _processor_seconds(workers: Sequence[int | None]) -> float:
    """That this process and the workers have had, from Linux's /proc: what other people's work does not lengthen."""
    ticks = 0
    for process in (os.getpid(), *workers):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _resident_gib(workers: Sequence[int | None]) -> float:
    """Of this process and the workers that still run, from Linux's /proc."""
    total = 0
    for process in (os.getpid(), *workers):
        try:
            status = Path(f"/proc/{process}/status").read_text()
        except OSError:
            continue
        total += sum(int(size) for size in re.findall(r"VmRSS:\s+(\d+)", status))
    return total / 2**20
