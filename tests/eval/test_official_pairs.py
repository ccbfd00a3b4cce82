"""Captions, retrieval and zero-shot classification in the layouts they are downloaded in."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import open_clip
import pytest

from vlm.errors import UsageError
from vlm.eval.metrics.caption import caption_metrics
from vlm.eval.score import score_caption
from vlm.eval.tasks.zero_shot import CIFAR_TEMPLATES

RNG = np.random.default_rng(0)


def unit(size: int = 12) -> np.ndarray:
    vector = RNG.normal(size=size).astype(np.float32)
    return vector / np.linalg.norm(vector)


# ------------------------------------------------------------------------------------------------------------ captions

TOLD = {11: ["a red kite", "a kite over the beach"], 12: ["two dogs run"], 13: ["a man on a horse", "one horse"]}
SAID = {11: "a kite over a beach", 12: "two dogs", 13: "a horse"}


def write_coco(path: Path, as_json, name: str = "{:012d}.jpg", **domains: str) -> None:
    images = [{"id": i, "file_name": name.format(i)} | ({"domain": domains[f"d{i}"]} if domains else {}) for i in TOLD]
    annotations = [{"id": 7, "image_id": i, "caption": caption} for i, captions in TOLD.items() for caption in captions]
    as_json(path, {"images": images, "annotations": annotations})


def test_coco_captions_are_scored_as_coco_caption_does(tmp_path: Path, picture, as_json, run_task, puppet) -> None:
    folder = tmp_path / "data"
    write_coco(folder / "annotations" / "captions_val2017.json", as_json)
    for number in TOLD:
        picture(folder / "val2017" / f"{number:012d}.jpg", number)
    model = puppet(lambda numbers, prompt: SAID[numbers[0]] if prompt == "Describe." else "")
    metrics = run_task(model, "coco-captions", folder)
    official = json.loads((tmp_path / "out" / "coco-captions_results.json").read_text())
    assert official == [{"image_id": i, "caption": said} for i, said in SAID.items()]
    scored = score_caption(
        tmp_path / "out" / "coco-captions_results.json", folder / "annotations" / "captions_val2017.json"
    )
    assert metrics == pytest.approx(scored["metrics"] | {"n": 3})


def test_nocaps_by_domain(tmp_path: Path, picture, as_json, run_task, puppet) -> None:
    folder = tmp_path / "data"
    domains = {"d11": "in-domain", "d12": "out-domain", "d13": "in-domain"}
    write_coco(folder / "nocaps_val_4500_captions.json", as_json, "{}.jpg", **domains)
    for number in TOLD:
        picture(folder / "images" / f"{number}.jpg", number)
    metrics = run_task(puppet(lambda numbers, prompt: SAID[numbers[0]]), "nocaps", folder)
    own = caption_metrics({i: SAID[i] for i in (11, 13)}, {i: TOLD[i] for i in (11, 13)})
    assert metrics["CIDEr_in-domain"] == pytest.approx(own["CIDEr"])
    assert {"CIDEr_in-domain", "CIDEr_out-domain", "CIDEr", "Bleu_4"} <= set(metrics)


def write_karpathy(folder: Path, name: str, captions: dict[int, list[str]], as_json) -> None:
    images = [
        {
            "split": "test" if number < 100 else "train",
            "filename": f"{number}.jpg",
            "imgid": number,
            "sentences": [{"raw": caption, "tokens": []} for caption in told],
        }
        | ({"filepath": "val2014", "cocoid": 1000 + number} if name == "coco" else {})
        for number, told in captions.items()
    ]
    as_json(folder / f"dataset_{name}.json", {"images": images, "dataset": name})


@pytest.mark.parametrize(
    ("task", "name", "place"),
    [("coco-karpathy", "coco", "val2014"), ("flickr30k-captions", "flickr30k", "flickr30k-images")],
)
def test_the_karpathy_test_split(
    task: str, name: str, place: str, tmp_path: Path, picture, as_json, run_task, puppet
) -> None:
    folder = tmp_path / "data"
    write_karpathy(folder, name, TOLD | {101: ["a train caption"]}, as_json)
    for number in TOLD:
        picture(folder / place / f"{number}.jpg", number)
    metrics = run_task(puppet(lambda numbers, prompt: SAID[numbers[0]]), task, folder)
    assert metrics == pytest.approx(caption_metrics(SAID, TOLD) | {"n": 3})


# ----------------------------------------------------------------------------------------------------------- retrieval


@pytest.mark.parametrize(("name", "place"), [("coco", "val2014"), ("flickr30k", "flickr30k-images")])
def test_retrieval_is_what_ranks_say(name: str, place: str, tmp_path: Path, picture, as_json, run_task, puppet) -> None:
    """Six captions a picture, of which the last never counts; ranks by sorting, as CLIP's and open_clip's evaluations."""
    numbers = list(range(1, 31))
    captions = {number: [f"caption {number} {place}" for place in range(6)] for number in numbers}
    write_karpathy(tmp_path / "data", name, captions, as_json)
    model = puppet()
    for number in numbers:
        picture(tmp_path / "data" / place / f"{number}.jpg", number)
        model.vectors[number] = unit()
        for caption in captions[number][:5]:
            near = model.vectors[number] + 1.2 * unit()
            model.vectors[caption] = near / np.linalg.norm(near)
    metrics = run_task(model, f"{name}-retrieval", tmp_path / "data", batch=7)

    images = np.stack([model.vectors[number] for number in numbers])
    texts = np.stack([model.vectors[caption] for number in numbers for caption in captions[number][:5]])
    similarity, owner = images @ texts.T, np.repeat(np.arange(30), 5)
    first = [np.flatnonzero(owner[np.argsort(-row)] == place)[0] for place, row in enumerate(similarity)]
    back = [list(np.argsort(-column)).index(owner[place]) for place, column in enumerate(similarity.T)]
    for k in (1, 5, 10):
        assert metrics[f"image_to_text_R@{k}"] == pytest.approx(np.mean(np.array(first) < k))
        assert metrics[f"text_to_image_R@{k}"] == pytest.approx(np.mean(np.array(back) < k))
    assert 0.2 < metrics["image_to_text_R@1"] < 1


# ----------------------------------------------------------------------------------------------------------- zero-shot


def test_limit_leaves_all_classes(tmp_path: Path, picture, run_task, puppet) -> None:
    model = puppet()
    for name in ("cat", "dog"):
        picture(tmp_path / "data" / name / "1.jpg", 1)
        model.vectors |= {template(name): unit() for template in open_clip.OPENAI_IMAGENET_TEMPLATES}
    model.vectors[1] = unit()
    metrics = run_task(model, "folder", tmp_path / "data", limit=1)
    assert (metrics["n"], metrics["labels"]) == (1, 2)


def test_imagenet_wants_all_thousand_folders_with_pictures(tmp_path: Path, picture, run_task, puppet) -> None:
    folder = tmp_path / "data" / "val"
    data = picture(tmp_path / "one.jpg", 1).read_bytes()
    for place in range(1000):
        (folder / f"n{place:08d}").mkdir(parents=True)
        (folder / f"n{place:08d}" / "a.JPEG").write_bytes(data)
    model = puppet()
    same = unit()
    for name in open_clip.IMAGENET_CLASSNAMES:
        model.vectors |= {template(name): same for template in open_clip.OPENAI_IMAGENET_TEMPLATES}
    for template in open_clip.OPENAI_IMAGENET_TEMPLATES:
        model.vectors[template("goldfish")] = -same  # class 1
    model.vectors[1] = -same
    metrics = run_task(model, "imagenet", tmp_path / "data", batch=4000)
    assert metrics["accuracy"] == pytest.approx(1 / 1000) and metrics["labels"] == 1000
    (folder / "n00000003" / "a.JPEG").unlink()
    with pytest.raises(UsageError, match=r"1 of 1000 class folders have no picture \(n00000003\)"):
        run_task(model, "imagenet", tmp_path / "data")
    (folder / "n00000003").rmdir()
    with pytest.raises(UsageError, match="999 of 1000 class folders are there"):
        run_task(model, "imagenet", tmp_path / "data")


@pytest.mark.parametrize(
    ("task", "batch", "meta", "label", "names"),
    [
        ("cifar10", "cifar-10-batches-py/test_batch", "cifar-10-batches-py/batches.meta", "labels", "label_names"),
        ("cifar100", "cifar-100-python/test", "cifar-100-python/meta", "fine_labels", "fine_label_names"),
    ],
)
def test_cifar_from_its_pickles(
    task: str, batch: str, meta: str, label: str, names: str, tmp_path: Path, run_task, puppet
) -> None:
    pixels = np.stack([np.full(3072, number, dtype=np.uint8) for number in (10, 20, 30)])
    path = tmp_path / "data" / batch
    path.parent.mkdir(parents=True)
    path.write_bytes(pickle.dumps({"data": pixels, label: [0, 1, 1]}, protocol=2))
    (tmp_path / "data" / meta).write_bytes(pickle.dumps({names: ["apple_pie", "cat"]}, protocol=2))
    model = puppet()
    pie, cat = np.eye(12, dtype=np.float32)[:2]
    model.vectors |= {template.format("apple pie"): pie for template in CIFAR_TEMPLATES}
    model.vectors |= {template.format("cat"): cat for template in CIFAR_TEMPLATES}
    model.vectors |= {10: pie, 20: cat, 30: pie}
    metrics = run_task(model, task, tmp_path / "data")
    assert metrics["accuracy"] == pytest.approx(2 / 3) and metrics["mean_per_class"] == pytest.approx(0.75)
    assert len(set(CIFAR_TEMPLATES)) == 18 and "a black and white photo of the {}." in CIFAR_TEMPLATES


def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path, run_task, puppet) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (exec, ("raise SystemExit",))

    for name in ("test_batch", "batches.meta"):
        path = tmp_path / "cifar-10-batches-py" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UsageError, match="it would call builtins.exec"):
        run_task(puppet(), "cifar10", tmp_path)


def test_pictures_that_are_arrays_can_be_blanked(tmp_path: Path, run_task, puppet) -> None:
    path = tmp_path / "data" / "cifar-10-batches-py"
    path.mkdir(parents=True)
    (path / "test_batch").write_bytes(pickle.dumps({"data": np.full((2, 3072), 9, dtype=np.uint8), "labels": [0, 1]}))
    (path / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat", "dog"]}))
    model = puppet()
    model.vectors |= {template.format(name): unit() for template in CIFAR_TEMPLATES for name in ("cat", "dog")}
    model.vectors |= {9: unit(), 128: unit()}
    metrics = run_task(model, "cifar10", tmp_path / "data", blind=True, shuffled=True)
    assert metrics["accuracy"] == metrics["blind"]["accuracy"] == metrics["shuffled"]["accuracy"] == 0.5
