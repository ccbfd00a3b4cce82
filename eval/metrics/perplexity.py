"""Perplexity per token. Knows log-probabilities; knows nothing of tokens or models."""

from __future__ import annotations

import math
from collections.abc import Sequence


def perplexity(likelihoods: Sequence[tuple[float, int]]) -> float:
    """exp(−sum of log p / sum of tokens) over (log p of a text, its tokens). Raises ValueError without tokens.

    Infinite where the mean log-probability is below what a float can undo.
    """
    tokens = sum(count for _, count in likelihoods)
    if tokens == 0:
        raise ValueError("no tokens to weigh")
    mean = -sum(log_probability for log_probability, _ in likelihoods) / tokens
    return math.exp(mean) if mean < 709 else math.inf
