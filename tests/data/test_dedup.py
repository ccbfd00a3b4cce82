"""Near-duplicates: what is dropped is what comparing all with all in order would drop, however the work is cut up."""

from __future__ import annotations

import builtins
import itertools
import math
import multiprocessing
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pytest
from PIL import Image

from vlm.data_tools import dedup
from vlm.data_tools.bench_dedup import captions, labelled, peak_of
from vlm.data_tools.dedup import Dropped, Marks, Rules, dropped, find_duplicates, sign
from vlm.data_tools.dedup_image import NO_HASH, distances, image_hash, image_keys
from vlm.data_tools.dedup_text import band_count, band_rows, jaccards, rare_keys, shingle, text_bands, words
from vlm.errors import UsageError

Sample = tuple[str | None, tuple[int, ...]]
Found = dict[int, tuple[int, bool]]  # a dropped sample's number -> the kept one's, and whether that is protected

WORDS = "a red blue circle square dog cat on the left right of grass table big small two sits runs".split()


def grams(text: str | None) -> set:
    """The judge's own n-grams, of strings; its texts are ASCII words and spaces."""
    found = re.findall(r"[a-z0-9]+", (text or "").lower())
    edged = ["^", *found, "$"]
    return {*found, *itertools.pairwise(edged), *zip(edged, edged[1:], edged[2:], strict=False)} if found else set()


def jaccard(one: str | None, other: str | None) -> float:
    left, right = grams(one), grams(other)
    return len(left & right) / len(left | right) if left and right else 0.0


def near(one: Sample, other: Sample, rules: Rules) -> bool:
    texts = jaccard(one[0], other[0]) >= rules.jaccard - 1e-9
    alike = len(one[1]) == len(other[1]) and all(
        0 not in (a, b) and (a ^ b).bit_count() <= rules.distance for a, b in zip(one[1], other[1], strict=True)
    )
    return {"text": texts, "image": alike and bool(one[1]), "pair": texts and alike}[rules.by]


def brute_force(samples: Sequence[Sample], rules: Rules, protected: int = 0) -> Found:
    """All with all, in order; the first `protected` samples stay."""
    kept: list[int] = []
    found: Found = {}
    for number, sample in enumerate(samples):
        match = next((other for other in kept if near(sample, samples[other], rules)), None)
        if match is None or number < protected:
            kept.append(number)
        else:
            found[number] = (match, match < protected)
    return found


def put(folder: Path, samples: Sequence[Sample], sizes: Sequence[int], rules: Rules) -> list[str]:
    assert sum(sizes) == len(samples)
    rest = iter(samples)
    names = []
    for number, size in enumerate(sizes):
        piece = list(itertools.islice(rest, size))
        names.append(f"piece-{number}")
        sign([text for text, _ in piece], [pictures for _, pictures in piece], rules).save(folder, names[-1])
    return names


def read(folder: Path, pieces: Sequence[str], sizes: Sequence[int]) -> Found:
    firsts = np.cumsum([0, *sizes])
    found = {}
    for number, piece in enumerate(pieces):
        drops = dropped(folder, piece)
        kept = firsts[drops.kept_piece] + drops.kept_index
        for index, match, contaminated in zip(drops.index, kept, drops.contaminated, strict=True):
            found[int(firsts[number] + index)] = (int(match), bool(contaminated))
    return found


def run(
    folder: Path,
    samples: Sequence[Sample],
    rules: Rules,
    sizes: Sequence[int] | None = None,
    protected: int = 0,
    map: Callable[..., Iterable[Any]] = map,
) -> Found:
    sizes = sizes or [len(samples)]
    pieces = put(folder, samples, sizes, rules)
    find_duplicates(folder, pieces, rules, protected, map)
    return read(folder, pieces, sizes)


def mixed(number: int, seed: int) -> list[Sample]:
    """Texts and pictures with families of near ones, equal ones, empty ones and flat ones."""
    rng = np.random.default_rng(seed)
    samples: list[Sample] = []
    for _ in range(number):
        text: list[str] = rng.choice(WORDS, rng.integers(1, 24)).tolist()
        pictures = tuple(int(value) for value in rng.integers(1, 2**64, rng.integers(0, 3), dtype=np.uint64))
        if samples and rng.random() < 0.7:
            other = samples[rng.integers(len(samples))]
            text = (other[0] or "").split()
            pictures = tuple(flip(value, rng.integers(0, 64, rng.integers(0, 4))) for value in other[1])
            for _ in range(rng.integers(0, 3)):
                text.insert(rng.integers(len(text) + 1), str(rng.choice(WORDS)))
        if rng.random() < 0.05:
            pictures = (NO_HASH, *pictures[1:])
        samples.append((" ".join(text) if rng.random() > 0.05 else None, pictures))
    return samples


def flip(value: int, bits: Iterable[int]) -> int:
    for bit in bits:
        value ^= 1 << int(bit)
    return value


@pytest.fixture
def tiny(monkeypatch):
    """Chunks and partitions of a few samples, so that a small set goes through all that a large one does."""
    monkeypatch.setattr(dedup, "CHUNK", 40)
    monkeypatch.setattr(dedup, "PARTITION", 2000)
    monkeypatch.setattr(dedup, "VALUES", 300)


# The result


@pytest.mark.parametrize("protected", [0, 2])
@pytest.mark.parametrize("by", ["text", "image", "pair"])
def test_drops_what_comparing_all_with_all_in_order_would_drop(tmp_path, tiny, by, protected):
    rules = Rules(by, jaccard=0.7)  # a pair at 0.7 is missed by the bands once in fifty; the families are closer
    sizes = [30, 25, 0, 1, 94, 50]
    for seed in range(3):
        samples = mixed(sum(sizes), seed)
        judge = brute_force(samples, rules, sum(sizes[:protected]))
        assert len(judge) > 20 and any(contaminated for _, contaminated in judge.values()) == bool(protected)
        assert run(tmp_path / str(seed), samples, rules, sizes, protected) == judge


def test_a_chain_does_not_drift(tmp_path):
    """b is near a, c near b and not near a: c stays, as what would stand for it is gone."""
    words = [f"w{number}" for number in range(24)]
    chain = [" ".join(words[start:] + [f"x{number}" for number in range(start)]) for start in (0, 1, 2)]
    assert jaccard(*chain[:2]) >= 0.8 and jaccard(*chain[1:]) >= 0.8 > jaccard(chain[0], chain[2])
    assert run(tmp_path, [(text, ()) for text in chain], Rules("text")) == {1: (0, False)}


def test_contamination_names_the_protected_sample_and_spares_the_protected(tmp_path):
    rules = Rules("text")
    samples: list[Sample] = [
        ("a dog runs", ()),
        ("a dog runs", ()),
        ("two cats", ()),
        ("A dog runs!", ()),
        ("two cats", ()),
    ]
    assert run(tmp_path, samples, rules, [2, 3], protected=1) == {3: (0, True), 4: (2, False)}
    drops = dropped(tmp_path, "piece-1")
    assert isinstance(drops, Dropped)
    assert (drops.index.tolist(), drops.kept_piece.tolist(), drops.kept_index.tolist()) == ([1, 2], [0, 1], [0, 0])


def test_nothing_is_a_duplicate_of_nothing(tmp_path):
    empty: list[Sample] = [(None, ()), ("", ()), (" .!?", ()), (None, ()), ("cat", (NO_HASH,)), ("cat", (NO_HASH,))]
    assert run(tmp_path / "text", empty[:4], Rules("text")) == {}
    assert run(tmp_path / "image", empty, Rules("image")) == {}
    assert run(tmp_path / "pair", empty, Rules("pair")) == {}
    assert run(tmp_path / "none", [], Rules("pair"), [0]) == {}
    find_duplicates(tmp_path, [], Rules())


# The same, however it is done


def test_pieces_chunks_and_processes_change_nothing(tmp_path, tiny):
    samples = mixed(300, 9)
    rules = Rules("pair")
    alone = run(tmp_path / "0", samples, rules)
    assert len(alone) > 20
    assert run(tmp_path / "1", samples, rules, [100, 7, 193]) == alone
    assert run(tmp_path / "2", samples, rules, [10] * 30) == alone
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert run(tmp_path / "3", samples, rules, [10] * 30, map=pool.imap) == alone


def every_byte(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Killed(Exception):
    pass


def twice(function: Callable, items: Iterable) -> Iterable:
    """A map that does each piece of work two times over and holds the files to be the same."""
    folder = function.args[-1].folder if isinstance(function.args[-1], dedup._Plan) else function.args[0]
    for item in items:
        first = function(item)
        before = every_byte(folder)
        assert function(item) == first
        assert every_byte(folder) == before
        yield first


def test_work_done_again_writes_the_same_bytes(tmp_path, tiny):
    rules = Rules("pair")
    samples = mixed(120, 3)
    assert run(tmp_path, samples, rules, [50, 70], map=twice) == brute_force(samples, rules)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("stage", range(1, 6))
def test_killed_and_run_again_is_run_once(tmp_path, tiny, stage):
    number = itertools.count()

    def dying(function: Callable, items: Iterable) -> Iterable:
        dies = next(number) == stage
        *rest, last = items
        yield from builtins.map(function, rest)
        if dies:
            raise Killed
        yield function(last)

    rules = Rules("text")
    samples = mixed(200, 4)
    sizes = [60, 60, 80]
    pieces = put(tmp_path, samples, sizes, rules)
    with pytest.raises(Killed):
        find_duplicates(tmp_path, pieces, rules, map=dying)
    with pytest.raises(UsageError, match="no such file; sign every piece"):
        dropped(tmp_path, pieces[0])
    find_duplicates(tmp_path, pieces, rules)
    assert read(tmp_path, pieces, sizes) == brute_force(samples, rules)


def test_marks_are_saved_as_they_are(tmp_path):
    marks = sign(["a cat", None, "two dogs"], [(3,), (), (4, 2**64 - 1)], Rules("pair"))
    marks.save(tmp_path, "x")
    again = Marks.load(tmp_path, "x")
    assert len(again) == 3
    assert again.pictures.values.tolist() == [3, 4, 2**64 - 1]
    before = (tmp_path / "marks" / "x.npz").read_bytes()
    again.save(tmp_path, "x")
    assert (tmp_path / "marks" / "x.npz").read_bytes() == before


def test_errors_name_the_thing_and_the_mend(tmp_path):
    for rules, message in (
        ({"by": "sound"}, "duplicates by 'sound': not known; use one of text, image, pair"),
        ({"jaccard": 0.2}, "duplicates at a Jaccard similarity of 0.2: not in 0.5 to 1; 0.8 is usual"),
        ({"distance": 9}, "duplicates within 9 bits: not in 0 to 6; 4 is usual"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            Rules(**rules)
    with pytest.raises(UsageError, match=r"a\.npz: no such file; sign every piece"):
        find_duplicates(tmp_path, ["a"], Rules())
    sign(["a"], [()], Rules("text", 0.7)).save(tmp_path, "a")
    mend = r"signed by text at 0.7 and 4 bits, asked for by text at 0.8 and 4 bits; sign it again"
    with pytest.raises(UsageError, match=mend):
        find_duplicates(tmp_path, ["a"], Rules("text"))


# Recall, and crowds


def test_near_captions_are_found_and_others_are_kept(tmp_path):
    texts, twins, others, swapped = labelled(1500, seed=5)
    assert all(jaccard(texts[twin], texts[base]) >= 0.8 for twin, base in twins.items())
    assert all(jaccard(texts[other], texts[base]) < 0.6 for other, base in others.items())
    found = run(tmp_path, [(text, ()) for text in texts], Rules("text"))
    assert np.mean([twin in found for twin in twins]) >= 0.95
    assert len(swapped) > 500 and np.mean([other in found for other in [*others, *swapped]]) <= 0.005
    assert all(jaccard(texts[drop], texts[kept]) >= 0.8 and kept < drop for drop, (kept, _) in found.items())


def crowd(kind: str, number: int) -> tuple[list[Sample], Rules, Callable[[int], int | None]]:
    """A set whose samples would all be compared with all, its rules, and which sample stands for each."""
    long = "the same long caption that begins every advertisement of this one shop with free delivery"
    rng = np.random.default_rng(0)
    if kind == "equal texts":
        return [("the same caption", (number,)) for number in range(number)], Rules("text"), lambda n: 0
    if kind == "equal pictures":
        return [(str(number), (7,)) for number in range(number)], Rules("image"), lambda n: 0
    if kind == "near texts":
        return [(f"{long} item{number}", ()) for number in range(number)], Rules("text"), lambda n: 0
    if kind == "one picture, other texts":
        return [(f"{number} x{number}", (7,)) for number in range(number)], Rules("pair"), lambda n: n
    if kind == "one text, other pictures":
        hashes = rng.integers(1, 2**64, number, dtype=np.uint64).tolist()
        return [("photo", (value,)) for value in hashes], Rules("pair"), lambda n: n
    half = 0xABCDEF << 40
    hashes = (rng.integers(1, 2**40, number, dtype=np.uint64) | np.uint64(half)).tolist()
    return [("", (value,)) for value in hashes], Rules("image"), lambda n: n


CROWDS = [
    "equal texts",
    "equal pictures",
    "near texts",
    "one picture, other texts",
    "one text, other pictures",
    "a band",
]


@pytest.mark.parametrize("kind", CROWDS)
def test_a_crowd_is_not_compared_all_with_all(tmp_path, monkeypatch, kind):
    number = 3000
    samples, rules, stand = crowd(kind, number)
    compared = []
    monkeypatch.setattr(
        dedup, "_near", lambda plan, a, b, near=dedup._near: compared.append(len(a)) or near(plan, a, b)
    )
    monkeypatch.setattr(dedup, "CHUNK", 1000)
    found = run(tmp_path, samples, rules, [500] * 6)
    assert found == {each: (stand(each), False) for each in range(number) if stand(each) != each}
    assert sum(compared) <= (0 if "equal" in kind else 20 * number)


def test_duplicates_inside_a_crowd_are_found_by_what_is_rare(tmp_path, monkeypatch):
    """Every text in one bucket, the duplicates among them far apart."""
    monkeypatch.setattr(dedup, "text_bands", lambda starts, values, jaccard: np.ones((len(starts) - 1, 1), np.uint64))
    long = "buy this now at the one and only shop with free delivery of the"
    items = [f"{long} item{number} size{number} shade{number} kind{number}" for number in range(400)]
    assert jaccard(items[0], items[1]) < 0.8
    texts = items + [f"{text} today" for text in items]
    found = run(tmp_path, [(text, ()) for text in texts], Rules("text"))
    assert found == {400 + number: (number, False) for number in range(400)}


# Texts


def test_words_are_the_same_however_they_are_written():
    assert words("A Red-Circle,  on\tTop!") == words("a red circle on top") == ["a", "red", "circle", "on", "top"]
    assert words("Ｃａｆé №") == words("CAFE\u0301 no")  # full width and one sign; letter and accent
    assert words("红色圆圈") == list("红色圆圈")
    assert words("किताब है") == ["किताब", "है"]


def test_sets_are_the_judges():
    texts = [text for text, _ in mixed(80, 1)]
    starts, values = shingle(texts)
    assert np.diff(starts).tolist() == [len(grams(text)) for text in texts]
    sets = [set(values[start:stop].tolist()) for start, stop in itertools.pairwise(starts.tolist())]
    for one, other in itertools.combinations(range(80), 2):
        assert len(sets[one] & sets[other]) == len(grams(texts[one]) & grams(texts[other]))
    row = np.arange(79)
    lengths = np.diff(starts)
    similar = jaccards((starts[:80], values[: starts[79]]), (starts[1:] - starts[1], values[starts[1] :]))
    assert similar == pytest.approx([jaccard(texts[n], texts[n + 1]) for n in row]) and lengths.min() == 0


@pytest.mark.parametrize(("edit", "least"), [("added", 10), ("put in", 13), ("changed", 18), ("swapped", 30)])
def test_how_long_a_text_hides_one_edit(edit, least):
    for length in range(4, 40):
        one = [f"w{number}" for number in range(length)]
        other = one.copy()
        middle = length // 2
        if edit == "added":
            other.append("new")
        elif edit == "put in":
            other.insert(middle, "new")
        elif edit == "changed":
            other[middle] = "new"
        elif length > 12:  # so that no n-gram holds both, or an end
            other[3], other[-4] = other[-4], other[3]
        else:
            continue
        assert (jaccard(" ".join(one), " ".join(other)) >= 0.8 - 1e-9) == (length >= least), length


def test_colours_that_change_places_are_another_caption():
    assert jaccard("red circle left of blue square", "blue circle left of red square") < 0.6


def test_bands_are_shared_as_often_as_similarity_says():
    """P(some band is shared) = 1 - (1 - s^rows)^bands, for sets of known similarity."""
    assert (band_count(0.8), band_rows(0.8)) == (24, 8)
    rng = np.random.default_rng(0)
    for similarity, common in ((0.8, 16), (0.6, 12)):
        values = rng.integers(0, 2**64, (2000, 20), dtype=np.uint64)  # common, and half of the rest on either side
        rest = (20 - common) // 2
        bands = [
            text_bands(np.arange(2001) * (common + rest), side.ravel(), 0.8)
            for side in (np.delete(values, np.s_[common : common + rest], 1), values[:, : common + rest])
        ]
        share = np.mean((bands[0] == bands[1]).any(1))
        expected = 1 - (1 - similarity**8) ** 24
        assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 2000))


def test_rare_keys_never_part_what_is_near():
    texts = [text for text, _ in mixed(120, 6)]
    starts, values = shingle(texts)
    row, keys = rare_keys(starts, values, np.full(120, 5, np.uint64), 0.8)
    of = [set(keys[row == number].tolist()) for number in range(120)]
    pairs = list(itertools.combinations(range(120), 2))
    near = [pair for pair in pairs if jaccard(texts[pair[0]], texts[pair[1]]) >= 0.8]
    assert len(near) > 10 and all(of[one] & of[other] for one, other in near)
    assert sum(bool(of[one] & of[other]) for one, other in pairs) < len(pairs)


# Pictures


@pytest.mark.parametrize("distance", range(7))
@pytest.mark.parametrize("samples", [10, 10**6, 10**9])
def test_near_hashes_share_a_key(distance, samples):
    rng = np.random.default_rng(distance)
    hashes = rng.integers(0, 2**64, 300, dtype=np.uint64)
    near = np.array([flip(int(value), rng.choice(64, distance, False)) for value in hashes], np.uint64)
    assert (distances(hashes, near) == distance).all()
    keys = image_keys(hashes, distance, samples)
    assert (keys == image_keys(near, distance, samples)).any(1).all()
    assert keys.shape[1] <= 128
    assert (keys == np.roll(keys, 1, 0)).mean() < 1 / 256  # and others do not


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((96, 96), Image.Resampling.BICUBIC)


def test_the_hash_is_imagehashs_and_outlives_a_smaller_jpeg(tmp_path):
    hashes = []
    for seed in range(8):
        image = picture(seed)
        image.resize((80, 80)).save(tmp_path / "x.jpg", quality=60)
        one, other = image_hash(image), image_hash(Image.open(tmp_path / "x.jpg"))
        assert one == int(str(imagehash.phash(image)), 16)
        assert (one ^ other).bit_count() <= 4
        hashes.append(one)
    assert min((a ^ b).bit_count() for a, b in itertools.combinations(hashes, 2)) > 6


def test_a_flat_picture_has_no_hash():
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(118, 124, (64, 64, 3), dtype=np.uint8))
    assert image_hash(noise) == image_hash(Image.new("RGB", (8, 8), "white")) == NO_HASH


# The benchmark's parts


def test_captions_are_the_seeds_and_memory_is_counted():
    assert captions(50, seed=3) == captions(50, seed=3) != captions(50, seed=4)
    assert len(set(captions(500, seed=3))) > 400
    with peak_of([]) as peak:
        held = np.ones(30_000_000)
    assert peak.gib > 0.2 and held.any()
