"""How far a model's confidence is from how often it is right. Knows probabilities and hits; nothing of models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BINS = 15


def expected_calibration_error(
    confidence: Sequence[float] | np.ndarray, right: Sequence[float] | np.ndarray, bins: int = BINS
) -> float:
    """ECE in [0, 1] (Guo et al. 2017, eq. 3): mean |accuracy - confidence| of equally wide bins, by their share.

    confidence: (N,) in [0, 1], of the answer given; right: (N,) 0, 1, or a score between. A bin holds its upper edge.
    Raises ValueError for lengths that differ, nothing to score, and a confidence outside [0, 1].
    """
    sure, hit = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if sure.ndim != 1 or sure.shape != hit.shape or not len(sure):
        raise ValueError(f"need a confidence and a score an answer; got shapes {sure.shape} and {hit.shape}")
    if not ((sure >= 0) & (sure <= 1)).all():
        raise ValueError(f"confidences lie in [0, 1]; got {sure.min()} to {sure.max()}")
    place = np.clip(np.ceil(sure * bins) - 1, 0, bins - 1).astype(int)
    gaps = np.bincount(place, hit, bins) - np.bincount(place, sure, bins)  # sums: the bin's size cancels
    return float(np.abs(gaps).sum() / len(sure))
