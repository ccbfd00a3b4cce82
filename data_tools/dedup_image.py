"""How near two pictures are: a 64-bit perceptual hash, and keys that near hashes are certain to share.

Knows Pillow images, bits and arrays. Knows nothing of samples, files or what is done with a duplicate.
"""

from __future__ import annotations

import math
from itertools import combinations

import imagehash
import numpy as np
from PIL import Image

from .dedup_text import mix

BITS = 64
NO_HASH = 0  # the hash of a picture in which there is nothing to compare
FLATNESS = 2.0  # standard deviation of the grey levels, of 255
MOST_DISTANCE = 6
MOST_KEYS = 128


def image_hash(image: Image.Image) -> int:
    """The picture's perceptual hash, 0 to 2**64 - 1: signs of its low frequencies about their median (pHash, ImageHash).

    A near-uniform picture hashes to NO_HASH, which is near to nothing: its low frequencies are the noise of the encoder,
    so that of two such pictures the hashes say nothing. Drop those by their flatness. As half of the bits are set,
    distances are even but for ties: 4 bits is two frequencies that changed sides.
    """
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float64)
    return NO_HASH if grey.std() < FLATNESS else int(str(imagehash.phash(image)), 16)


def distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """How many bits differ: of uint64 hashes, shape (n,), int64 (n,)."""
    return np.unpackbits((left ^ right).view(np.uint8).reshape(-1, 8), axis=1).sum(1, dtype=np.int64)


def image_keys(hashes: np.ndarray, distance: int, samples: int) -> np.ndarray:
    """Keys (n, keys) uint64 of hashes (n,) uint64; two hashes within `distance` have one in common, for certain.

    Cut into `distance` + k bands, two such hashes agree in k of them, and any k make a key (Manku, Jain, Das Sarma,
    "Detecting near-duplicates for web crawling", 2007). k is the smallest whose keys tell `samples` samples apart with
    six bits to spare, so that a hash meets few others that are not near it.
    """
    same = _agreeing(distance, samples)
    edges = [round(BITS * band / (distance + same)) for band in range(distance + same + 1)]
    masks = [(1 << stop) - (1 << start) for start, stop in zip(edges, edges[1:], strict=False)]
    chosen = [np.uint64(sum(some)) for some in combinations(masks, same)]
    return np.stack([mix(mix(hashes & mask) + np.uint64(number)) for number, mask in enumerate(chosen)], axis=1)


def _agreeing(distance: int, samples: int) -> int:
    needed = math.log2(max(samples, 2)) + 6
    possible = [same for same in range(1, BITS) if math.comb(distance + same, same) <= MOST_KEYS] if distance else [1]
    return next((same for same in possible if BITS * same / (distance + same) >= needed), possible[-1])
