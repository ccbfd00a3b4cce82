"""Near-duplicate samples of a set of any size, through files: marks of every piece in, what to drop of every piece out.

Knows the order of samples, what is near by the rules, and how to bring near samples together without holding them all.
Knows nothing of shards, of how a text or picture was read, or of what runs the work: `map(function, items)` does, a
process pool's or a cluster's, and all that passes through it is small. The bulk lies in files under one folder that
every worker sees. A piece of work run again writes the same bytes, and a killed one leaves no file that looks whole.

Samples are taken in the order of pieces, then in the order within. A sample is dropped if it is near an earlier sample
that is kept, and reported as the duplicate of the first such. So what is dropped was always compared with what stands
for it, and chains do not drift: with a near b near c, but not a near c, c is kept.

The work is map, shuffle, reduce: samples alike in everything that counts are one from the start (by a 64-bit hash); the
others go under keys that near samples share (MinHash bands of texts, bands of picture hashes); those under one key are
candidates; candidates are compared exactly; one pass over the near pairs decides. That last pass holds eight bytes a
sample; every other part holds one chunk of pieces or one partition of keys, and their number grows with the samples.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vlm.files import atomic_write

from .dedup_image import distances, image_keys
from .dedup_marks import Marks, Rows, Rules, identities, opened, signed_samples
from .dedup_shuffle import gather, save, scatter
from .dedup_text import PAIR_BITS, band_count, jaccards, mix, rare_keys, shingle, text_bands

CHUNK = 1 << 15  # samples of consecutive pieces that are worked on together
PARTITION = 1 << 19  # keys, of 16 bytes, that are sorted together
VALUES = 1 << 20  # n-grams, of 8 bytes, that are compared together
CROWD = 32  # samples under one key of which every pair is a candidate
REACH = 2  # in a larger crowd, how many before it and how many of the first a sample is paired with


@dataclass(frozen=True)
class Dropped:
    """What to drop of one piece, arrays of one length: `index` of the sample in its piece, ascending, and the kept sample
    that it is near, `kept_index` of the piece numbered `kept_piece`; `contaminated` where that one is protected.
    """

    index: np.ndarray
    kept_piece: np.ndarray
    kept_index: np.ndarray
    contaminated: np.ndarray


def sign(texts: Sequence[str | None], pictures: Sequence[Sequence[int]], rules: Rules) -> Marks:
    """The marks of a piece: of every sample its text, or None, and the `image_hash` of each of its pictures."""
    seen = Rows.of(pictures)
    starts, values = shingle([None] * len(texts) if rules.by == "image" else texts)
    # By pairs, pictures bring together what the texts need not.
    wanted = (np.diff(starts) > 0) & ((rules.by == "text") | (seen.lengths == 0))
    banded = np.flatnonzero(wanted)
    sets = Rows(starts, values).take(banded)
    return Marks(rules.code, Rows(starts, values), seen, banded, text_bands(sets.starts, sets.values, rules.jaccard))


def find_duplicates(
    folder: str | Path, pieces: Sequence[str], rules: Rules, protected: int = 0, map: Callable[..., Iterable[Any]] = map
) -> None:
    """Compare the samples of `pieces`, signed into `folder` by these rules, and write what to drop of each.

    The first `protected` pieces are sets for evaluation: nothing of them is dropped, and what is near them is contamination.
    `map` runs a function on items, anywhere that sees `folder`, and gives the results in order. Up to 3 * 10**9 samples.
    Raises UsageError if a piece has no marks, or has those of other rules.
    """
    chunks = _chunks(pieces, list(map(partial(signed_samples, Path(folder), rules), pieces)))
    plan = _Plan(Path(folder), rules, tuple(chunk.first for chunk in chunks), sum(sum(chunk.sizes) for chunk in chunks))
    shutil.rmtree(plan.work, ignore_errors=True)
    for work, items in (
        (_lay_out, chunks),
        (_find_equal, range(plan.identity_parts)),
        (_spread_keys, chunks),
        (_find_candidates, range(plan.key_parts)),
        (_compare, chunks),
    ):
        for _ in map(partial(work, plan), items):
            pass
    _choose(plan, chunks, protected)
    shutil.rmtree(plan.work, ignore_errors=True)


def dropped(folder: str | Path, piece: str) -> Dropped:
    """What `find_duplicates` wrote of a piece; raises UsageError if it did not."""
    with opened(_drops(folder, piece)) as file:
        return Dropped(file["index"], file["kept_piece"], file["kept_index"], file["contaminated"])


# The plan: samples are numbered in their order, consecutive pieces make chunks


@dataclass(frozen=True)
class _Chunk:
    number: int
    first: int  # the number of its first sample
    pieces: tuple[str, ...]
    sizes: tuple[int, ...]

    def own(self) -> np.ndarray:
        return np.arange(self.first, self.first + sum(self.sizes))


@dataclass(frozen=True)
class _Plan:
    """What every piece of work is told: small, however many samples there are."""

    folder: Path
    rules: Rules
    firsts: tuple[int, ...]  # the number of each chunk's first sample
    samples: int

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def identity_parts(self) -> int:
        return self.samples // PARTITION + 1

    @property
    def key_parts(self) -> int:
        images = image_keys(np.zeros(1, np.uint64), self.rules.distance, self.samples).shape[1]
        keys = {"text": [band_count(self.rules.jaccard)], "image": [images]}
        return self.samples * max(keys.get(self.rules.by, keys["text"] + keys["image"])) // PARTITION + 1

    def chunk_of(self, samples: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.firsts, samples, side="right") - 1


def _chunks(pieces: Sequence[str], sizes: Sequence[int]) -> list[_Chunk]:
    chunks: list[_Chunk] = []
    start = first = 0
    for stop in range(1, len(pieces) + 1):
        samples = sum(sizes[start:stop])
        if samples >= CHUNK or stop == len(pieces):
            chunks.append(_Chunk(len(chunks), first, tuple(pieces[start:stop]), tuple(sizes[start:stop])))
            start, first = stop, first + samples
    return chunks


# The pieces of work, in the order they are run


def _lay_out(plan: _Plan, chunk: _Chunk) -> None:
    """Put the sets and hashes of a chunk where single rows can be read, and send its samples to meet their equals."""
    marks = [Marks.load(plan.folder, piece) for piece in chunk.pieces]
    shingles = Rows.join([each.shingles for each in marks])
    pictures = Rows.join([each.pictures for each in marks])
    for kind, rows in (("shingles", shingles), ("pictures", pictures)):
        save(plan.work / f"{kind}-starts-{chunk.number}", rows.starts)
        save(plan.work / f"{kind}-{chunk.number}", np.append(rows.values, np.uint64(0)))  # an empty file maps badly
    identity, known = identities(plan.rules, shingles, pictures)
    places = np.flatnonzero(known)
    _, first, inverse = np.unique(identity[places], return_index=True, return_inverse=True)
    roots = np.full(len(known), -1)
    roots[places] = places[first][inverse] + chunk.first
    save(plan.work / f"leaders-{chunk.number}", roots)
    # Of equal samples of a chunk only the first goes on, so that a million equal ones are few anywhere.
    firsts = places[np.sort(first)]
    to = identity[firsts] % np.uint64(plan.identity_parts)
    scatter(plan.work / f"identities-{chunk.number}", to, plan.identity_parts, identity[firsts], firsts + chunk.first)


def _find_equal(plan: _Plan, part: int) -> None:
    """Tell every sample that equals an earlier one of another chunk which is the first."""
    identity, sample = gather(plan.work, "identities", len(plan.firsts), part, plan.identity_parts)
    _, first, inverse = np.unique(identity, return_index=True, return_inverse=True)
    root = sample[first][inverse]
    later = root != sample
    to = plan.chunk_of(sample[later])
    scatter(plan.work / f"equal-{part}", to, len(plan.firsts), sample[later], root[later])


def _spread_keys(plan: _Plan, chunk: _Chunk) -> None:
    """Settle which samples equal which, and send those that equal no earlier one to meet what may be near."""
    roots = np.load(plan.work / f"leaders-{chunk.number}.npy")
    sample, root = gather(plan.work, "equal", plan.identity_parts, chunk.number, len(plan.firsts))
    final = chunk.own()
    final[sample.astype(np.int64) - chunk.first] = root
    known = roots >= 0
    roots[known] = final[roots[known] - chunk.first]
    save(plan.work / f"roots-{chunk.number}", roots)
    marks = [Marks.load(plan.folder, piece) for piece in chunk.pieces]
    place, key = _keys(plan, marks)
    alone = roots[place] == place + chunk.first
    key, place = key[alone], place[alone]
    to = key % np.uint64(plan.key_parts)
    scatter(plan.work / f"keys-{chunk.number}", to, plan.key_parts, key, place + chunk.first)


def _keys(plan: _Plan, marks: Sequence[Marks]) -> tuple[np.ndarray, np.ndarray]:
    """Every key of every sample of a chunk: its place in the chunk, int64, and the key, uint64, in the order of places."""
    befores = np.cumsum([0, *(len(each) for each in marks)])
    banded = np.concatenate([each.banded + before for each, before in zip(marks, befores, strict=False)])
    bands = np.concatenate([each.bands for each in marks])
    place, key = np.repeat(banded, bands.shape[1]), bands.ravel()
    if plan.rules.by != "text":
        pictures = Rows.join([each.pictures for each in marks])
        pictured = np.flatnonzero(pictures.lengths)
        # As many pictures, each near: so the first ones are near.
        keys = image_keys(pictures.values[pictures.starts[pictured]], plan.rules.distance, plan.samples)
        keys = mix(keys ^ pictures.lengths[pictured, None].astype(np.uint64))
        place = np.concatenate([place, np.repeat(pictured, keys.shape[1])])
        key = np.concatenate([key, keys.ravel()])
    order = np.argsort(place, kind="stable")
    return place[order], key[order]


def _find_candidates(plan: _Plan, part: int) -> None:
    """Send every two samples that share a key, but for crowds, to be compared."""
    key, sample = gather(plan.work, "keys", len(plan.firsts), part, plan.key_parts)
    found, key, sample = _meet(plan, key, sample.astype(np.int64))
    if plan.rules.by != "image":
        found = _union(found, *(_meet(plan, *crowd)[0] for crowd in _split(plan, key, sample)))
    later, earlier = np.divmod(found, max(plan.samples, 1))
    scatter(plan.work / f"pairs-{part}", plan.chunk_of(later), len(plan.firsts), later, earlier)


def _meet(plan: _Plan, key: np.ndarray, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of samples with one key, (n,) int64 `later * plan.samples + earlier`; and keys and samples of crowds, sorted.

    `sample` ascends under every key. In a crowd each sample is paired with REACH before it and REACH of the first, so
    that the work grows with the crowd and not with its square.
    """
    order = np.argsort(key, kind="stable")
    key, sample = key[order], sample[order]
    start = np.searchsorted(key, key)  # where its key begins
    rank = np.arange(len(key)) - start
    crowded = np.searchsorted(key, key, side="right") - start > CROWD
    pairs = [np.zeros(0, np.int64)]
    later = np.arange(len(key))
    for gap in range(1, CROWD):
        later = later[(rank[later] >= gap) & (~crowded[later] | (gap <= REACH))]
        pairs.append(sample[later] * plan.samples + sample[later - gap])
    for number in range(REACH):
        later = np.flatnonzero(crowded & (rank > REACH + number))
        pairs.append(sample[later] * plan.samples + sample[start[later] + number])
    return _union(*pairs), key[crowded], sample[crowded]


def _split(plan: _Plan, key: np.ndarray, sample: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """New keys for the samples of crowds, by their rarest n-grams; a crowd of more than VALUES n-grams is cut in order."""
    if not len(key):
        return
    total = np.cumsum(_lengths(plan, "shingles", sample))
    before = total[np.searchsorted(key, key)]  # of its crowd's first sample
    block = before // VALUES + (total - before) // VALUES
    for number in np.unique(block):
        here = block == number
        rows = _rows(plan, "shingles", sample[here])
        row, keys = rare_keys(rows.starts, rows.values, key[here], plan.rules.jaccard)
        yield keys, sample[here][row]


def _compare(plan: _Plan, chunk: _Chunk) -> None:
    """Keep of a chunk's candidates the pairs that are near, sorted: (pairs, 2) int64, the later first."""
    later, earlier = gather(plan.work, "pairs", plan.key_parts, chunk.number, len(plan.firsts))
    found = np.unique(later * np.uint64(plan.samples) + earlier).astype(np.int64)
    pairs = np.stack(np.divmod(found, max(plan.samples, 1)), axis=1)
    near = [_near(plan, *block.T) for block in _blocks(pairs, np.ones(len(pairs), np.int64))]
    save(plan.work / f"near-{chunk.number}", pairs[np.concatenate([np.zeros(0, bool), *near])])


def _near(plan: _Plan, later: np.ndarray, earlier: np.ndarray) -> np.ndarray:
    near = np.ones(len(later), bool)
    if plan.rules.by != "text":
        near = _pictures_near(plan, later, earlier)
    if plan.rules.by != "image":
        near[near] = _texts_near(plan, later[near], earlier[near])
    return near


def _pictures_near(plan: _Plan, later: np.ndarray, earlier: np.ndarray) -> np.ndarray:
    one, other = _rows(plan, "pictures", later), _rows(plan, "pictures", earlier)
    near = one.lengths == other.lengths
    one, other = one.take(np.flatnonzero(near)), other.take(np.flatnonzero(near))
    near[near] = one.sums((distances(one.values, other.values) > plan.rules.distance).astype(np.int64)) == 0
    return near


def _texts_near(plan: _Plan, later: np.ndarray, earlier: np.ndarray) -> np.ndarray:
    sizes = np.stack([_lengths(plan, "shingles", samples) for samples in (later, earlier)])
    near = sizes.min(0) >= plan.rules.jaccard * sizes.max(0) - 1e-9  # others can not be
    pairs = np.stack([later, earlier], axis=1)[near]
    similar = [np.zeros(0)]
    for block in _blocks(pairs, sizes.sum(0)[near]):
        rows = [_rows(plan, "shingles", samples) for samples in block.T]
        similar.append(jaccards(*((each.starts, each.values) for each in rows)))
    near[near] = np.concatenate(similar) >= plan.rules.jaccard - 1e-9
    return near


def _choose(plan: _Plan, chunks: Sequence[_Chunk], protected: int) -> None:
    """Take the samples in order, drop each that is near a kept one, and write it down by piece."""
    sizes = [size for chunk in chunks for size in chunk.sizes]
    firsts = np.cumsum([0, *sizes])
    safe = int(firsts[protected])
    first_near = np.arange(plan.samples)  # of every sample the first kept one that it is near, itself if there is none
    view = first_near.data  # reads and writes single numbers several times faster
    piece = 0
    for chunk in chunks:
        for later, earlier in np.load(plan.work / f"near-{chunk.number}.npy").tolist():
            if view[later] == later and (earlier < safe or view[earlier] == earlier):
                view[later] = earlier
        roots = np.load(plan.work / f"roots-{chunk.number}.npy")
        equal = np.flatnonzero((roots >= 0) & (roots != chunk.own()))
        first_near[equal + chunk.first] = first_near[roots[equal]]
        for name in chunk.pieces:
            _write_drops(plan.folder, name, first_near, firsts, piece, protected)
            piece += 1


def _write_drops(
    folder: Path, name: str, first_near: np.ndarray, firsts: np.ndarray, piece: int, protected: int
) -> None:
    near = first_near[firsts[piece] : firsts[piece + 1]]
    index = np.flatnonzero(near != np.arange(firsts[piece], firsts[piece + 1])) if piece >= protected else np.arange(0)
    kept_piece = np.searchsorted(firsts[:-1], near[index], side="right") - 1
    kept_index = near[index] - firsts[kept_piece]
    with atomic_write(_drops(folder, name)) as file:
        np.savez(file, index=index, kept_piece=kept_piece, kept_index=kept_index, contaminated=kept_piece < protected)


# Pairs and rows


def _union(*parts: np.ndarray) -> np.ndarray:
    return np.unique(np.concatenate(parts))


def _blocks(pairs: np.ndarray, sizes: np.ndarray) -> Iterator[np.ndarray]:
    """Consecutive parts of as many pairs, and of sizes that sum to as much, as are compared at a time."""
    start = 0
    ends = np.cumsum(sizes)
    while start < len(pairs):
        before = ends[start] - sizes[start]
        stop = min(max(int(np.searchsorted(ends, before + VALUES, side="right")), start + 1), start + (1 << PAIR_BITS))
        yield pairs[start:stop]
        start = stop


def _rows(plan: _Plan, kind: str, samples: np.ndarray) -> Rows:
    """The sets or hashes of samples, in any order."""
    distinct, inverse = np.unique(samples, return_inverse=True)
    parts = [rows.take(own) for rows, own in _by_chunk(plan, kind, distinct)]
    return Rows.join([Rows.of([]), *parts]).take(inverse)


def _lengths(plan: _Plan, kind: str, samples: np.ndarray) -> np.ndarray:
    distinct, inverse = np.unique(samples, return_inverse=True)
    parts = [rows.starts[own + 1] - rows.starts[own] for rows, own in _by_chunk(plan, kind, distinct)]
    return np.concatenate([np.zeros(0, np.int64), *parts])[inverse]


def _by_chunk(plan: _Plan, kind: str, samples: np.ndarray) -> Iterator[tuple[Rows, np.ndarray]]:
    """The chunks that hold `samples`, ascending, and the places there. Only what is taken of a chunk is read."""
    cuts = np.append(np.searchsorted(samples, plan.firsts), len(samples))
    for number in np.flatnonzero(np.diff(cuts)).tolist():
        paths = (plan.work / f"{kind}-starts-{number}.npy", plan.work / f"{kind}-{number}.npy")
        rows = Rows(*(np.asarray(np.load(path, mmap_mode="r")) for path in paths))
        yield rows, samples[cuts[number] : cuts[number + 1]] - plan.firsts[number]


def _drops(folder: str | Path, piece: str) -> Path:
    return Path(folder) / "dropped" / f"{piece}.npz"
