"""Near pictures: their hashes, and the keys that near hashes share."""

from __future__ import annotations

import itertools

import imagehash
import numpy as np
import pytest
from near_samples import flip
from PIL import Image

from vlm.data_tools.dedup_image import NO_HASH, distances, image_hash, image_keys


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
