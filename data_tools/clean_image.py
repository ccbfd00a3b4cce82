"""Judges the pictures of a sample.

Knows sizes and how little there may be to see. Knows nothing of files, which `vlm.images.open_image` has opened, nor of
what a picture shows.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from .clean_rules import Images, Reason, Rules

SHRUNK = 32  # pixels of a side, at which noise and the grain of a compression have averaged out
# A hairline averages out too, but its pixels stand out, as those of noise do not.
STANDING_OUT = 48  # 8-bit levels from the usual one
STANDING_SHARE = 1 / 4000  # of the pixels


def fault(image: Image.Image, rules: Rules) -> Reason | None:
    """The first reason to drop a sample for this RGB picture, or None.

    Sizes are judged as in DataComp (Gadre et al. 2023, https://arxiv.org/abs/2304.14108), by looser numbers. A
    placeholder that says so in letters is a picture of letters to this; what it has is duplicates.
    """
    small, large = sorted(image.size)
    if small < rules.images.min_side:
        return Reason.SMALL
    if large > rules.images.max_aspect * small:
        return Reason.ASPECT
    return Reason.UNIFORM if _is_blank(image, rules.images) else None


def _is_blank(image: Image.Image, rules: Images) -> bool:
    shrunk = np.asarray(image.resize((SHRUNK, SHRUNK), Image.Resampling.BOX), np.float32)
    if shrunk.std(axis=(0, 1)).max() >= rules.min_contrast:
        return False
    counts = np.array(image.convert("L").histogram())
    usual = int(np.searchsorted(counts.cumsum(), counts.sum() / 2))
    near = counts[max(0, usual - STANDING_OUT) : usual + STANDING_OUT + 1].sum()
    return bool(counts.sum() - near < STANDING_SHARE * counts.sum())
