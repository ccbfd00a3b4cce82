"""How near two texts are: sets of word n-grams, their MinHash bands, their exact Jaccard similarity.

Knows words, hashes and arrays. Knows nothing of samples, files, pictures or what is done with a duplicate.

A text is the set of its words, and of the pairs and triples of neighbours among them and its two edges. At a Jaccard
similarity of 0.8, in a text of `n` different words: one word put in at an edge is still near from n = 10 on, put in
elsewhere from n = 13, one word changed from n = 18, two words that changed places from n = 30. So "red circle left of
blue square" is not near the same with the colours exchanged. Of made-up captions of 13 to 18 words are near to the same:

    n-grams                with a word put in   with one colour changed   with two colours exchanged
    words 1                100 %                100 %                     100 %
    words 1, 2             100 %                 71 %                      12 %
    words 1, 2, 3           74 %                  8 %                       0.3 %
    words 1, 2, 3, edges    94 %                  9 %                       0.0 %
    words 2, 3, edges       32 %                  0.2 %                     0.0 %
    characters 5           100 %                 54 %                      20 %
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from datasketch import MinHash

EDGE = ""  # stands before the first word and after the last
NGRAM = 3  # the longest, in words
PERMUTATIONS = 192
RECALL = 0.98  # of the bands, at the threshold itself; more similar pairs are found more surely
PAIR_BITS = 18  # pairs compared at a time: 2**18; the other 46 bits of a word hold the n-gram's hash

# Scripts written without spaces give a word a character; elsewhere a word ends at space and punctuation. `\w+` would not
# do: it cuts Indic words at every vowel sign.
_ALONE = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_BREAK = r"\s!-/:-@\[-`{-~\u00a1-\u00bf\u2000-\u206f\u3000-\u303f"
_WORD = re.compile(f"[{_ALONE}]|[^{_ALONE}{_BREAK}]+")


def words(text: str) -> list[str]:
    """The words of a text without regard to case, punctuation, space and ways of writing one character (NFKC)."""
    return _WORD.findall(text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold())


def shingle(texts: Sequence[str | None]) -> tuple[np.ndarray, np.ndarray]:
    """The set of each text, as rows: starts (texts + 1,) int64 into values uint64, sorted and different in each row.

    No text, and a text without a word, is an empty row. Values are 64-bit hashes, the same in every process.
    """
    split = [[EDGE, *found, EDGE] if (found := words(text or "")) else [] for text in texts]
    vocabulary = {word: _hash(word) for word in set().union(*split)}
    flat = np.array([vocabulary[word] for row in split for word in row], np.uint64)
    row = np.repeat(np.arange(len(split)), np.array([len(found) for found in split], np.int64))
    grams, rows = [flat], [row]
    for _ in range(NGRAM - 1):
        longer, last = grams[-1][:-1], flat[len(flat) - len(grams[-1]) + 1 :]
        grams.append(mix(longer * np.uint64(3) + last))  # the factor tells "a b" from "b a"
        rows.append(row[: len(last)])
    whole = [row[: len(each)] == row[len(row) - len(each) :] for each in grams]  # begun and ended in one text
    whole[0] = flat != _hash(EDGE)
    kept = [np.concatenate([each[inside] for each, inside in zip(side, whole, strict=True)]) for side in (rows, grams)]
    return _sets(kept[0], kept[1], len(split))


def band_rows(jaccard: float) -> int:
    """How many of the permutations go into a band: as many as leave a pair at `jaccard` RECALL to share some band.

    Bands: Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", 3.4. At 0.8 they are 24 bands of 8, recall 0.988.
    """
    fitting = (rows for rows in range(PERMUTATIONS, 1, -1) if _recall(jaccard, rows) >= RECALL)
    return next(fitting, 1)


def band_count(jaccard: float) -> int:
    return PERMUTATIONS // band_rows(jaccard)


def text_bands(starts: np.ndarray, values: np.ndarray, jaccard: float) -> np.ndarray:
    """MinHash (Broder, "On the resemblance and containment of documents", 1997) of every row, none of them empty.

    By datasketch, which takes 50 microseconds a caption and by that half of the time of the whole search.
    (rows, bands) uint64: one hash a band; two sets have an equal band with probability similarity ** rows of the band.
    """
    signature = MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=int, scheme="affine32")
    short = (values >> np.uint64(32)).tolist()
    minima = np.empty((len(starts) - 1, PERMUTATIONS), np.uint64)
    for row, (start, stop) in enumerate(zip(starts.tolist(), starts[1:].tolist(), strict=False)):
        one = signature.copy()
        one.update_batch(short[start:stop])
        minima[row] = one.hashvalues
    rows = band_rows(jaccard)
    bands = band_count(jaccard)
    hashes = np.tile(np.arange(bands, dtype=np.uint64), (len(minima), 1))
    for step in range(rows):
        hashes = mix(hashes * np.uint64(3) + minima[:, step : bands * rows : rows])
    return hashes


def jaccards(left: tuple[np.ndarray, np.ndarray], right: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The exact similarity of every row of `left` with the same row of `right`, (rows,) float64; at most 2**18 rows.

    A common n-gram is a value that comes twice in a pair. Of a hash 46 bits are compared, which takes one pair of sets
    of twenty in 10**11 for more similar than it is.
    """
    sizes = [np.diff(side[0]) for side in (left, right)]
    pair = np.concatenate([np.repeat(np.arange(len(size), dtype=np.uint64), size) for size in sizes])
    value = np.concatenate([left[1], right[1]])
    key = np.sort(pair << np.uint64(64 - PAIR_BITS) | value >> np.uint64(PAIR_BITS))
    twice = key[1:][key[1:] == key[:-1]] >> np.uint64(64 - PAIR_BITS)
    common = np.bincount(twice.astype(np.int64), minlength=len(sizes[0]))
    return common / np.maximum(sizes[0] + sizes[1] - common, 1)


def rare_keys(
    starts: np.ndarray, values: np.ndarray, bucket: np.ndarray, jaccard: float
) -> tuple[np.ndarray, np.ndarray]:
    """Split crowded buckets: for every row its bucket's rarest n-grams, as (row numbers int64, keys uint64).

    Two rows of one bucket at `jaccard` or above share a key, for certain: sets of x and y members that overlap in
    o >= jaccard * x share one of the first x - o + 1 in any one order (the prefix filter: Bayardo, Ma, Srikant,
    "Scaling up all pairs similarity search", 2007). Rarest first makes the new buckets small.
    """
    size = np.diff(starts)
    row = np.repeat(np.arange(len(size)), size)
    keys, inverse, counts = np.unique(mix(values ^ bucket[row]), return_inverse=True, return_counts=True)
    order = np.lexsort((inverse, counts[inverse], row))
    rank = np.arange(len(row)) - starts[row]
    taken = rank < (size - np.ceil(jaccard * size - 1e-9) + 1)[row]
    return row[taken], keys[inverse[order]][taken]


def mix(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that leaves no pattern (the finisher of SplitMix64: Steele, Lea, Flood, 2014)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


def _hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _sets(row: np.ndarray, value: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort((value, row))
    row, value = row[order], value[order]
    fresh = np.ones(len(row), bool)
    fresh[1:] = (row[1:] != row[:-1]) | (value[1:] != value[:-1])
    starts = np.concatenate([[0], np.cumsum(np.bincount(row[fresh], minlength=rows))])
    return starts.astype(np.int64), value[fresh]


def _recall(jaccard: float, rows: int) -> float:
    return 1 - (1 - jaccard**rows) ** (PERMUTATIONS // rows)
