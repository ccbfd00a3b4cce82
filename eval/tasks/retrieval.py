"""Retrieval on the Karpathy test splits: COCO (5 000 pictures) and Flickr30k (1 000), five captions a picture.

Knows the layouts that `captions.py` knows, https://cs.stanford.edu/people/karpathy/deepimagesent/: `coco-retrieval` reads
dataset_coco.json and val2014/, `flickr30k-retrieval` dataset_flickr30k.json and flickr30k-images/. Of a picture's captions the
first five count, as in all published numbers. R@k in [0, 1]: a picture finds a caption if any of its own is among the k
nearest, a caption finds its picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from ..metrics.retrieval import chance_of_any_hit, recall_both_ways
from .base import Item, Matching, Scored
from .benchmark import Benchmark, Example, Way
from .captions import read_karpathy

CAPTIONS = 5


def _read(folder: Path, name: str) -> Iterator[Example]:
    for example in read_karpathy(folder, name, "test"):
        yield replace(example, answers=example.answers[:CAPTIONS])


def _columns(items: Sequence[Item]) -> list[tuple[str, ...]]:
    return [(caption,) for item in items for caption in item.references]


def _metric(items: Sequence[Item], similarity: np.ndarray) -> Scored:
    texts = [caption for item in items for caption in item.references]
    owner = np.repeat(np.arange(len(items)), [len(item.references) for item in items])
    nearest = [texts[place] for place in similarity.argmax(axis=1)]
    hits = chance_of_any_hit(similarity, owner, 1).tolist()
    return Scored(recall_both_ways(similarity, image_of=owner), nearest, hits)


WAYS = {"match": Way("", Matching(_columns), lambda items, similarity: similarity)}
BENCHMARKS = tuple(
    Benchmark(
        name=f"{name}-retrieval",
        headline="image_to_text_R@1",
        read=partial(_read, name=name),
        ways=WAYS,
        metric=_metric,
    )
    for name in ("coco", "flickr30k")
)
