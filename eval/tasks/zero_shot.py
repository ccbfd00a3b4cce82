"""Zero-shot classification: ImageNet, CIFAR-10, CIFAR-100, and any folder of classes.

Knows these layouts:

* `imagenet`, https://image-net.org: val/n01440764/*.JPEG, a folder for each of the 1 000 WordNet ids (the validation
  pictures sorted into them, as every framework reads them). Names and the 80 templates are open_clip's.
* `cifar10`, `cifar100`, https://www.cs.toronto.edu/~kriz/cifar.html ("python version"): cifar-10-batches-py/test_batch and
  batches.meta; cifar-100-python/test and meta. With CLIP's 18 templates for them.
* `folder`: a folder a class, named like it (_ is a space), with pictures in it. With the 80 templates.

A class is the mean of its name in every template, as open_clip's `build_zero_shot_classifier` makes it. Accuracies are in
[0, 1]; `limit` takes the first pictures and leaves all classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from vlm.errors import UsageError

from ..metrics.retrieval import chance_of_hit
from .base import Item, Matching, Scored
from .benchmark import Benchmark, Example, Way
from .reading import first_named, first_of, pictures_in, read_pickle

CIFAR_ADJECTIVES = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
CIFAR_TEMPLATES = [
    *(f"a {adjective}photo of {article} {{}}." for article in ("a", "the") for adjective in CIFAR_ADJECTIVES),
    *(f"a photo of {article} {size} {{}}." for article in ("a", "the") for size in ("small", "big")),
]


def _imagenet_templates(name: str) -> tuple[str, ...]:
    from open_clip import OPENAI_IMAGENET_TEMPLATES  # open_clip takes a second to import, and few tasks need it

    return tuple(template(name) for template in OPENAI_IMAGENET_TEMPLATES)


def _cifar_templates(name: str) -> tuple[str, ...]:
    return tuple(template.format(name) for template in CIFAR_TEMPLATES)


def _read_imagenet(folder: Path) -> Iterator[Example]:
    from open_clip import IMAGENET_CLASSNAMES

    place = first_of(folder, "val")
    folders = sorted(path for path in place.glob("n*") if path.is_dir())
    if len(folders) != len(IMAGENET_CLASSNAMES):
        raise UsageError(
            f"{place}: {len(folders)} of {len(IMAGENET_CLASSNAMES)} class folders are there; sort them all in"
        )
    return _of_folders(place, folders, tuple(IMAGENET_CLASSNAMES))


def _read_folder(folder: Path) -> Iterator[Example]:
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return _of_folders(folder, folders, tuple(path.name.replace("_", " ") for path in folders))


def _of_folders(folder: Path, folders: Sequence[Path], names: tuple[str, ...]) -> Iterator[Example]:
    pictures = [pictures_in(path) for path in folders]
    empty = [path.name for path, found in zip(folders, pictures, strict=True) if not found]
    if empty:
        counts = f"{len(empty)} of {len(folders)} class folders have no picture ({first_named(empty)})"
        raise UsageError(f"{folder}: {counts}; finish the download")
    for name, found in zip(names, pictures, strict=True):
        for path in found:
            key = f"{path.parent.name}/{path.name}"
            yield Example(key, (path,), answers=(name,), options=names, key=key)


def _read_cifar(folder: Path, batch: str, meta: str, label: str, names: str) -> Iterator[Example]:
    content = read_pickle(first_of(folder, batch))
    classes = tuple(name.replace("_", " ") for name in read_pickle(first_of(folder, meta))[names])
    pixels = content["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    for place, number in enumerate(content[label]):
        yield Example(place, (partial(_picture, pixels[place]),), answers=(classes[number],), options=classes)


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels))


def _metric(items: Sequence[Item], similarity: np.ndarray) -> Scored:
    names = items[0].options
    places = {name: place for place, name in enumerate(names)}
    own = np.array([places[item.references[0]] for item in items])
    top1, top5 = (chance_of_hit(similarity, own, k) for k in (1, 5))
    each = [float(top1[own == place].mean()) for place in np.unique(own)]
    metrics = {
        "accuracy": float(top1.mean()),
        "top_5": float(top5.mean()),
        "mean_per_class": sum(each) / len(each),
        "labels": len(names),
    }
    return Scored(metrics, [names[place] for place in similarity.argmax(axis=1)], top1.tolist())


def _matched(templates: Callable[[str], tuple[str, ...]]) -> dict[str, Way]:
    asking = Matching(lambda items: [templates(name) for name in items[0].options])
    return {"match": Way("", asking, lambda items, similarity: similarity)}


def _benchmark(
    name: str, read: Callable[[Path], Iterator[Example]], templates: Callable[[str], tuple[str, ...]]
) -> Benchmark:
    return Benchmark(name=name, headline="accuracy", read=read, ways=_matched(templates), metric=_metric)


_CIFAR10 = partial(
    _read_cifar,
    batch="cifar-10-batches-py/test_batch",
    meta="cifar-10-batches-py/batches.meta",
    label="labels",
    names="label_names",
)
_CIFAR100 = partial(
    _read_cifar,
    batch="cifar-100-python/test",
    meta="cifar-100-python/meta",
    label="fine_labels",
    names="fine_label_names",
)
BENCHMARKS = (
    _benchmark("imagenet", _read_imagenet, _imagenet_templates),
    _benchmark("cifar10", _CIFAR10, _cifar_templates),
    _benchmark("cifar100", _CIFAR100, _cifar_templates),
    _benchmark("folder", _read_folder, _imagenet_templates),
)
