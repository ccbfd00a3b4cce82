"""Zero-shot classification and retrieval beside open_clip's own evaluation (`open_clip_train`) on the same embeddings.

Where similarities tie, open_clip's number depends on the order of classes or pairs, and ours is what it is on average over
all orders. open_clip scores one caption a picture; retrieval with five is held to ranks in `test_official_pairs.py`.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip_train.train import get_clip_metrics
from open_clip_train.zero_shot import accuracy
from open_clip_train.zero_shot import run as zero_shot
from PIL import Image

from vlm.eval.metrics.retrieval import chance_of_hit, recall_both_ways
from vlm.eval.tasks.zero_shot import CIFAR_TEMPLATES
from vlm.shards import ShardWriter

ARGS = SimpleNamespace(device="cpu", precision="fp32", batch_size=7)
RECALLS = [f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]


@pytest.fixture(autouse=True)
def numpy_of_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip 3.3 calls float() on an array of one number, which NumPy no longer takes; all else of it is untouched."""
    monkeypatch.setattr("open_clip_train.zero_shot.float", lambda array: array.item(), raising=False)


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    vectors = rng.normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


class Words(list):
    """Texts in the place of tokens."""

    def to(self, device: Any) -> Words:
        return self


class OpenClipModel:
    """What open_clip's evaluation asks of a model, over a table of embeddings; pictures are their numbers."""

    def __init__(self, vectors: dict[Any, np.ndarray]) -> None:
        self.vectors = vectors

    def encode_text(self, texts: Sequence[str], normalize: bool) -> torch.Tensor:
        return torch.tensor(np.stack([self.vectors[text] for text in texts]))

    def __call__(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"image_features": torch.tensor(np.stack([self.vectors[number] for number in image.tolist()]))}


def open_clips(
    vectors: dict[Any, np.ndarray], names: Sequence[str], templates: Any, pictures: Sequence[tuple[int, int]]
) -> tuple[float, float]:
    """Top-1 and top-5 as `open_clip_train` evaluates (number of a picture, its class), ten classes at a time."""
    model = OpenClipModel(vectors)
    classifier = open_clip.build_zero_shot_classifier(model, Words, names, templates)
    parts = [pictures[start : start + 7] for start in range(0, len(pictures), 7)]
    return zero_shot(model, classifier, [torch.tensor(part).unbind(dim=1) for part in parts], ARGS)


@pytest.mark.parametrize("seed", range(3))
def test_a_folder_of_classes_gets_open_clips_accuracy(seed: int, tmp_path: Path, picture, run_task, puppet) -> None:
    rng, model = np.random.default_rng(seed), puppet()
    names = [f"kind {place:02d}" for place in range(23)]
    middle = unit(rng, len(names), 32)
    templates = open_clip.OPENAI_IMAGENET_TEMPLATES
    for name, vector in zip(names, middle, strict=True):
        model.vectors |= {template(name): vector + unit(rng, 32) for template in templates}
    for text in list(model.vectors):
        model.vectors[text] /= np.linalg.norm(model.vectors[text])
    pictures = [(number, number % len(names)) for number in range(1, 101)]
    for number, own in pictures:
        picture(tmp_path / "data" / names[own].replace(" ", "_") / f"{number}.jpg", number)
        model.vectors[number] = unit(rng, 32) + 0.25 * middle[own]
        model.vectors[number] /= np.linalg.norm(model.vectors[number])
    metrics = run_task(model, "folder", tmp_path / "data", batch=16)
    assert (metrics["accuracy"], metrics["top_5"]) == open_clips(model.vectors, names, templates, pictures)
    assert 0.05 < metrics["accuracy"] < metrics["top_5"] < 0.95 and metrics["labels"] == 23 and metrics["n"] == 100


def test_cifar_gets_open_clips_accuracy(tmp_path: Path, run_task, puppet) -> None:
    rng, model = np.random.default_rng(0), puppet()
    names = open_clip.IMAGENET_CLASSNAMES[:10]
    path = tmp_path / "data" / "cifar-10-batches-py"
    path.mkdir(parents=True)
    pictures = [(number, int(rng.integers(10))) for number in range(100)]
    pixels = np.repeat(np.array([number for number, _ in pictures], dtype=np.uint8)[:, None], 3072, axis=1)
    (path / "test_batch").write_bytes(pickle.dumps({"data": pixels, "labels": [own for _, own in pictures]}))
    (path / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    model.vectors |= {template.format(name): unit(rng, 8) for name in names for template in CIFAR_TEMPLATES}
    model.vectors |= {number: unit(rng, 8) for number, _ in pictures}
    metrics = run_task(model, "cifar10", tmp_path / "data", batch=9)
    assert (metrics["accuracy"], metrics["top_5"]) == open_clips(model.vectors, names, CIFAR_TEMPLATES, pictures)


@pytest.mark.parametrize("number", [1, 9, 60])
def test_retrieval_on_shards_gets_open_clips_recalls(number: int, tmp_path: Path, run_task, puppet) -> None:
    rng, model = np.random.default_rng(number), puppet()
    images = unit(rng, number, 16)
    texts = images + 1.5 * unit(rng, number, 16)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    with ShardWriter(tmp_path / "data") as writer:
        for place in range(number):
            buffer = io.BytesIO()
            Image.new("RGB", (4, 4), (place,) * 3).save(buffer, "PNG")
            told = json.dumps({"caption": f"text {place}"}).encode()
            writer.write(f"{place:03d}", {"png": buffer.getvalue(), "json": told})
            model.vectors |= {place: images[place], f"text {place}": texts[place]}
    metrics = run_task(model, "retrieval", tmp_path / "data", batch=8)
    official = get_clip_metrics(torch.tensor(images), torch.tensor(texts), logit_scale=100.0)
    assert {name: metrics[name] for name in RECALLS} == pytest.approx(
        {name: official[name] for name in RECALLS}, abs=1e-12
    )
    assert number < 60 or 0.2 < metrics["image_to_text_R@1"] < metrics["image_to_text_R@10"] < 1


@pytest.mark.parametrize("size", [400, 1000])
def test_recalls_of_many_pairs_are_open_clips(size: int) -> None:
    rng = np.random.default_rng(size)
    images, texts = unit(rng, size, 64), unit(rng, size, 64)
    texts = texts + 0.3 * images
    official = get_clip_metrics(torch.tensor(images), torch.tensor(texts), logit_scale=1.0)
    ours = recall_both_ways(images @ texts.T)
    assert ours == pytest.approx({name: official[name] for name in RECALLS}, abs=1e-12)
    assert 0.05 < ours["image_to_text_R@1"] < 0.95


def test_where_classes_tie_it_is_open_clips_accuracy_over_all_orders() -> None:
    """Similarities are small whole numbers, so that ties are exact."""
    rng = np.random.default_rng(2)
    for classes in (5, 6):
        images = rng.integers(-1, 2, (12, 2)).astype(np.float32)
        weights = rng.integers(-1, 2, (classes, 2)).astype(np.float32)
        own = rng.integers(classes, size=12)
        similarity = images @ weights.T
        tied = (similarity == np.take_along_axis(similarity, own[:, None], 1)).sum(axis=1)
        assert (tied > 1).mean() > 0.5
        ranks, orders = (1, 2, 5), list(permutations(range(classes)))
        found = []
        for order in orders:
            target = torch.tensor([order.index(place) for place in own])
            found.append(accuracy(torch.tensor(similarity[:, order]), target, topk=ranks))
        assert len({told[0] for told in found}) > 1, "the order decides"
        for k, official in zip(ranks, np.mean(found, axis=0) / 12, strict=True):
            assert chance_of_hit(similarity, own, k).mean() == pytest.approx(official, abs=1e-12)


def test_where_pairs_tie_it_is_open_clips_recall_over_all_orders() -> None:
    rng = np.random.default_rng(1)
    images = torch.tensor(rng.integers(-1, 2, (6, 3)).astype(np.float32))
    texts = torch.tensor(rng.integers(-1, 2, (6, 3)).astype(np.float32))
    found = []
    for order in map(list, permutations(range(6))):
        told = get_clip_metrics(images[order], texts[order], logit_scale=1.0)
        found.append([told[name] for name in RECALLS])
    assert len({tuple(told) for told in found}) > 1, "the order decides"
    ours = recall_both_ways((images @ texts.T).numpy())
    assert [ours[name] for name in RECALLS] == pytest.approx(np.mean(found, axis=0).tolist(), abs=1e-12)
