"""Perplexity per token, per word and per byte. Knows log-probabilities and texts; knows nothing of tokens or models.

Perplexities per token of two models compare only where both cut texts alike; those per word and per byte always do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence


def perplexity(likelihoods: Sequence[tuple[float, int]]) -> float:
    """exp(−sum of log p / sum of tokens) over (log p of a text, its tokens). Raises ValueError without tokens.

    Infinite where the mean log-probability is below what a float can undo.
    """
    return _exp_mean(
        sum(log_probability for log_probability, _ in likelihoods), sum(n for _, n in likelihoods), "tokens"
    )


def perplexities(likelihoods: Sequence[tuple[float, int]], texts: Sequence[str]) -> dict[str, float]:
    """`perplexity` per token, `word_perplexity`, `byte_perplexity` and `bits_per_byte` of texts, (log p, tokens) each.

    Words are what white space separates and bytes those of UTF-8, as in lm-evaluation-harness's wikitext, whose names
    these are. Raises ValueError where there is nothing to divide by, or not one likelihood a text.
    """
    if len(likelihoods) != len(texts):
        raise ValueError(f"need one likelihood a text; got {len(likelihoods)} of {len(texts)} texts")
    total = sum(log_probability for log_probability, _ in likelihoods)
    size = sum(len(text.encode("utf-8")) for text in texts)
    return {
        "perplexity": perplexity(likelihoods),
        "word_perplexity": _exp_mean(total, sum(len(re.split(r"\s+", text)) for text in texts), "words"),
        "byte_perplexity": _exp_mean(total, size, "bytes"),
        "bits_per_byte": -total / size / math.log(2),
    }


def _exp_mean(log_probability: float, units: int, name: str) -> float:
    if units == 0:
        raise ValueError(f"no {name} to weigh")
    mean = -log_probability / units
    return math.exp(mean) if mean < 709 else math.inf
