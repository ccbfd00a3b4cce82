"""Captions: COCO, the Karpathy split of COCO and Flickr30k, NoCaps.

Knows these layouts:

* `coco-captions`, https://cocodataset.org/#download: annotations/captions_val2017.json and val2017/000000000042.jpg; train2017
  alike.
* `coco-karpathy`, https://cs.stanford.edu/people/karpathy/deepimagesent/: dataset_coco.json, and val2014/ of COCO (the test
  split has no other pictures).
* `flickr30k-captions`, from the same address: dataset_flickr30k.json, and flickr30k-images/ID.jpg or Images/ID.jpg.
* `nocaps`, https://nocaps.org/download: nocaps_val_4500_captions.json and images/FILE.jpg (of Open Images).

BLEU, ROUGE-L and CIDEr as coco-caption prints them; for NoCaps also CIDEr of each domain, whose document frequencies are
the domain's own, as its evaluation server computes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..metrics.caption import caption_metrics, cider
from ..metrics.tokenizer import tokenize
from .base import Item, Scored
from .benchmark import CAPTION_PROMPT, Benchmark, Example, written
from .reading import by_id, check_same, files, first_of, read_json, section


def _read_coco(path: Path, pictures: Path) -> Iterator[Example]:
    """A file of COCO's layout: images with ids, and annotations with a caption each."""
    content = read_json(path)
    images = by_id(path, section(path, content, "images"), "id")
    told: dict[Any, list[str]] = {}
    for entry in section(path, content, "annotations"):
        told.setdefault(entry["image_id"], []).append(entry["caption"])
    check_same(path, told, images, "image ids of its own images")
    for identity, image in images.items():
        yield Example(
            identity, (pictures / image["file_name"],), answers=tuple(told[identity]), type=image.get("domain")
        )


def _read_official(folder: Path, split: str) -> Iterator[Example]:
    (path,) = files(folder, f"annotations/captions_{split}.json")
    return _read_coco(path, folder / split)


def _read_nocaps(folder: Path) -> Iterator[Example]:
    (path,) = files(folder, "nocaps_val_4500_captions.json")
    return _read_coco(path, folder / "images")


def read_karpathy(folder: Path, name: str, split: str) -> Iterator[Example]:
    """The split of a Karpathy file, every picture with all its sentences as they were written."""
    (path,) = files(folder, f"dataset_{name}.json")
    entries = [entry for entry in section(path, read_json(path), "images") if entry["split"] == split]
    images = first_of(folder, "flickr30k-images", "Images") if name == "flickr30k" else folder
    for entry in entries:
        picture = images / entry.get("filepath", "") / entry["filename"]
        captions = tuple(sentence["raw"].strip() for sentence in entry["sentences"])
        yield Example(entry.get("cocoid", entry["imgid"]), (picture,), answers=captions)


def _metric(items: Sequence[Item], answers: Sequence[str]) -> Scored:
    metrics: dict[str, Any] = caption_metrics(
        dict(enumerate(answers)), {place: item.references for place, item in enumerate(items)}
    )
    for domain in sorted({item.type for item in items if item.type}):
        own = [place for place, item in enumerate(items) if item.type == domain]
        metrics[f"CIDEr_{domain}"] = _cider([items[place] for place in own], [answers[place] for place in own])[0]
    return Scored(metrics, answers, list(_cider(items, answers)[1]))


def _cider(items: Sequence[Item], answers: Sequence[str]) -> tuple[float, list[float]]:
    return cider([tokenize(said) for said in answers], [[tokenize(told) for told in item.references] for item in items])


COCO_CAPTIONS = Benchmark(
    name="coco-captions",
    headline="CIDEr",
    read=partial(_read_official, split="val2017"),
    train=partial(_read_official, split="train2017"),
    ways=written(CAPTION_PROMPT, 64),
    metric=_metric,
    submission=lambda item, answer: {"image_id": item.id, "caption": answer},
)
BENCHMARKS = (
    COCO_CAPTIONS,
    replace(
        COCO_CAPTIONS,
        name="coco-karpathy",
        read=partial(read_karpathy, name="coco", split="test"),
        train=partial(read_karpathy, name="coco", split="train"),
    ),
    replace(
        COCO_CAPTIONS,
        name="flickr30k-captions",
        read=partial(read_karpathy, name="flickr30k", split="test"),
        train=partial(read_karpathy, name="flickr30k", split="train"),
    ),
    replace(COCO_CAPTIONS, name="nocaps", read=_read_nocaps, train=None),
)
