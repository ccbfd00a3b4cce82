"""The report of an evaluation: which samples are its best and worst, and that what is shown of them is true, safe and small."""

from __future__ import annotations

import base64
import io
import json
import math
import pickle
import random
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm.eval.report_samples import BYTES, PICTURES, SHOWN, SIDE, TEXT, choose, less_is_better
from vlm.eval.run import evaluate
from vlm.shards import Shards, ShardWriter

HOSTILE = '<script>alert("x")</script> & \'"><img src=http://example.org/x onerror=alert(1)>'


def png(number: int, size: tuple[int, int] = (8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (number,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def write_shards(folder: Path, number: int, question: str = "Which number?", **more: Any) -> Path:
    """Grey pictures 1, 2, …; asked for their number."""
    with ShardWriter(folder) as writer:
        for place in range(1, number + 1):
            asked = [{"question": question, "answer": str(place), "type": "number"}]
            fields = {"qa": asked, "caption": f"picture {place}"} | more
            writer.write(f"{place:03d}", {"png": png(place), "json": json.dumps(fields).encode()})
    return folder


def report_of(folder: Path) -> str:
    return (folder / "report.html").read_text("utf-8")


def groups(page: str, task: str) -> dict[str, list[str]]:
    """Heading -> figures of one task."""
    (part,) = re.findall(rf"<h3>{re.escape(task)}</h3>(.*?)(?:<h3>|</section>)", page, re.DOTALL)
    return {
        heading: re.findall(r"<figure.*?</figure>", figures, re.DOTALL)
        for heading, figures in re.findall(r"<h4>(.*?)</h4>(.*?)(?=<h4>|$)", part, re.DOTALL)
    }


def shown_in(figure: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r'<img src="data:image/\w+;base64,([^"]+)"', figure)]


def rows(figure: str) -> dict[str, list[str]]:
    """What stands in the table of a figure: label -> its cells, as a reader sees them."""
    return {
        label: [unescape(re.sub("<.*?>", "", cell)) for cell in re.findall("<td.*?>(.*?)</td>", cells)]
        for label, cells in re.findall("<tr[^>]*><th>(.*?)</th>(.*?)</tr>", figure)
    }


# ------------------------------------------------------------------------------------------------------ which are chosen


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("number", [2, 7, 11, 12, 13, 60])
def test_the_best_and_the_worst_are_those_that_sorting_finds(number: int, lower: bool) -> None:
    rng = random.Random(number)
    lines = [{"key": str(n), "score": rng.random()} for n in range(number)]
    found = dict(choose(lines, lower))
    ranked = sorted(lines, key=lambda line: -line["score"] if lower else line["score"])
    assert found["The best"] == ranked[::-1][: min(SHOWN, number - 1)]
    assert found["The worst"] == ranked[: min(SHOWN, number - len(found["The best"]))]


def test_no_right_answer_is_among_the_worst_and_no_wrong_one_among_the_best() -> None:
    lines = [{"key": str(n), "score": float(n < 2)} for n in range(40)]
    found = dict(choose(lines))
    assert [line["score"] for line in found["The best"]] == [1.0, 1.0]
    assert [line["score"] for line in found["The worst"]] == [0.0] * SHOWN


def test_of_equals_first_those_where_the_picture_made_the_difference_then_other_pictures() -> None:
    lines = [{"key": "a", "id": n, "score": n % 2, "blind": {"score": n % 2}} for n in range(20)]
    lines += [{"key": "b", "id": 20, "score": 1, "blind": {"score": 0}}, {"key": "b", "id": 21, "score": 0}]
    lines += [{"key": "b", "id": 22, "score": 0, "blind": {"score": 1}}]
    found = dict(choose(lines))
    assert [line["id"] for line in found["The best"]] == [20, 1, 3, 5, 7, 9]
    assert [line["id"] for line in found["The worst"]] == [22, 0, 2, 21, 4, 6]


def test_equal_scores_and_none_at_all() -> None:
    ((words, some),) = choose([{"key": str(n), "score": 0.5} for n in range(30)])
    assert words == "All are worth 0.5; some of them" and len(some) == SHOWN
    assert choose([{"key": "a", "score": None}, {"key": "b", "score": "nan"}]) == []
    found = dict(choose([{"key": "a", "score": "inf"}, {"key": "b", "score": 3.0}, {"key": "c", "score": None}], True))
    assert [line["key"] for line in found["The worst"]] == ["a"] and [x["key"] for x in found["The best"]] == ["b"]


def test_which_tasks_have_scores_that_are_better_lower() -> None:
    assert [less_is_better(name) for name in ("vqa", "perplexity", "perplexity@test-hard", "wikitext2", "pope", "gone")] == [
        False, True, True, True, False, False,
    ]  # fmt: skip


# -------------------------------------------------------------------------------------------------- what is shown of them


@pytest.fixture
def answers(puppet):
    """A model that reads the numbers up to 20 off the pictures, says "7" to what it does not know, and weighs pictures."""
    return puppet(
        lambda numbers, prompt: str(numbers[0]) if numbers[0] <= 20 else "7",
        lambda numbers, prompt, said: (-float(numbers[0]), 1),
    )


def test_pictures_questions_answers_and_scores_are_those_of_the_samples(answers, tmp_path: Path) -> None:
    data, out = write_shards(tmp_path / "data", 30), tmp_path / "out"
    evaluate(answers, ["vqa"], data, out)
    pictures = {sample.key: sample.images[0] for sample in Shards.open(data)}
    lines = {line["key"]: line for line in map(json.loads, (out / "samples.jsonl").read_text("utf-8").splitlines())}
    found = groups(report_of(out), "vqa")
    assert list(found) == ["The worst", "The best"] and [len(figures) for figures in found.values()] == [SHOWN] * 2
    for heading, figures in found.items():
        for figure in figures:
            (key,) = re.findall(r'<p class="id">(\d+), number</p>', figure)
            line = lines[key]
            assert shown_in(figure) == [pictures[key]] and '<p class="asked">Which number?</p>' in figure
            told = {"it says": line, "blind": line["blind"], "shuffled": line["shuffled"]}
            expected = {name: [one["prediction"], f"{one['score']:.0f}"] for name, one in told.items()}
            assert rows(figure) == expected | {"right": line["references"]}
            assert line["score"] == (heading == "The best") == (int(key) <= 20)


def test_every_task_on_every_split_and_texts_without_pictures(answers, tmp_path: Path) -> None:
    for split in ("test", "test-other"):
        write_shards(tmp_path / "data" / split, 14)
    answers.vectors = {n: np.eye(300)[n] for n in range(256)} | {f"picture {n}": np.eye(300)[n] for n in range(20)}
    tasks = ["vqa", "caption", "retrieval", "perplexity"]
    evaluate(answers, tasks, tmp_path / "data", tmp_path / "out")
    page = report_of(tmp_path / "out")
    for name in [*tasks, *(f"{task}@test-other" for task in tasks)]:
        figures = [figure for each in groups(page, name).values() for figure in each]
        assert figures and all(len(shown_in(figure)) == 1 for figure in figures), name
    worst, best = groups(page, "perplexity").values()
    assert rows(best[0])["score"][-1] == f"{math.e:.3g}" and rows(worst[0])["score"][-1] == f"{math.exp(14):.3g}"
    (tmp_path / "texts").mkdir()
    for name in ("one", "two"):
        (tmp_path / "texts" / f"{name}.txt").write_text(f"the text called {name} " + "on and " * 500)
    evaluate(answers, ["text"], tmp_path / "texts", tmp_path / "text-out")
    page = report_of(tmp_path / "text-out")
    assert "<img" not in page and "the text called one on and" in page and "on and " * (TEXT // 7 + 1) not in page


def test_pictures_that_are_no_files_are_read_again(puppet, tmp_path: Path) -> None:
    path = tmp_path / "data" / "cifar-10-batches-py"
    path.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (4, 3072), dtype=np.uint8)
    (path / "test_batch").write_bytes(pickle.dumps({"data": pixels, "labels": [0, 1, 0, 1]}))
    (path / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat", "dog"]}))
    model = puppet()
    model.embed_image = lambda images, batch_size: np.stack(
        [np.eye(2)[n % 2 if n < 3 else 0] for n in range(len(images))]
    )
    model.embed_text = lambda texts, batch_size: np.stack([np.eye(2)[int("dog" in text)] for text in texts])
    evaluate(model, ["cifar10"], tmp_path / "data", tmp_path / "out", blind=False, shuffled=False)
    found = groups(report_of(tmp_path / "out"), "cifar10")
    assert [len(figures) for figures in found.values()] == [1, 3]
    (wrong,) = found["The worst"]
    with Image.open(io.BytesIO(shown_in(wrong)[0])) as image:
        assert np.array_equal(np.array(image), pixels[3].reshape(3, 32, 32).transpose(1, 2, 0))


def test_the_page_stays_small(answers, tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    with ShardWriter(tmp_path / "data") as writer:
        for place in range(2 * SHOWN + 3):
            parts = {}
            for picture in range(PICTURES + 2):
                buffer = io.BytesIO()
                Image.fromarray(noise.integers(0, 255, (300, 400, 3), dtype=np.uint8)).save(buffer, "JPEG")
                parts[f"{picture}.jpg"] = buffer.getvalue()
            asked = {"qa": [{"question": "long " * 1000, "answer": "7" if place % 2 else "8"}]}
            writer.write(str(place), {**parts, "json": json.dumps(asked).encode()})
    evaluate(answers, ["vqa"], tmp_path / "data", tmp_path / "out", blind=False, shuffled=False)
    page = report_of(tmp_path / "out")
    shown = shown_in(page)
    assert len(shown) == 2 * SHOWN * PICTURES and page.count("and 2 more") == 2 * SHOWN
    for data in shown:
        with Image.open(io.BytesIO(data)) as image:
            assert max(image.size) == SIDE
    assert len(page) < 2 * SHOWN * (PICTURES * 4 / 3 * 3 * BYTES + 10 * TEXT)


# ------------------------------------------------------------------------------------------- what is hostile or missing


def test_nothing_from_the_data_becomes_markup(puppet, tmp_path: Path) -> None:
    write_shards(tmp_path / "data", 3, HOSTILE, caption=HOSTILE)
    evaluate(puppet(lambda numbers, prompt: HOSTILE), ["vqa", "caption"], tmp_path / "data", tmp_path / "out")
    page = report_of(tmp_path / "out")
    assert "<script" not in page and len(re.findall("<img ", page)) == 3 * 2
    assert all(re.match(r'<img src="data:image/', tag) for tag in re.findall("<img [^>]*>", page))
    assert unescape(page).count(HOSTILE) >= 3 * 2 * 3


def test_data_that_is_gone_or_damaged_is_said(answers, tmp_path: Path, picture) -> None:
    from vlm.eval.report_evaluation import write_evaluation

    data, out = write_shards(tmp_path / "data", 3), tmp_path / "out"
    evaluate(answers, ["vqa"], data, out)
    shutil.rmtree(data)
    assert write_evaluation(out) == out / "report.html"
    page = report_of(out)
    assert "The data of main is no longer as it was, so no pictures can be shown:" in page and "<img" not in page
    assert page.count("<figure") == 3

    for number in (1, 2):
        picture(tmp_path / "classes" / f"kind {number}" / f"{number}.jpg", number)
    answers.embed_image = lambda images, batch_size: np.eye(2)[: len(images)]
    answers.embed_text = lambda texts, batch_size: np.stack([np.eye(2)[0] for _ in texts])
    evaluate(answers, ["folder"], tmp_path / "classes", out)
    (tmp_path / "classes" / "kind 2" / "2.jpg").write_bytes(b"\xff\xd8 cut")
    (tmp_path / "classes" / "kind 1" / "1.jpg").unlink()
    write_evaluation(out)
    page = report_of(out)
    assert "<img" not in page
    assert all(f"The picture of sample kind {n}/{n}.jpg can no longer be read." in page for n in (1, 2))


def test_a_benchmark_that_keeps_its_answers_has_no_best(answers, tmp_path: Path, picture, as_json) -> None:
    asked = [{"question_id": 1, "image_id": 1, "question": "Which number?"}]
    as_json(tmp_path / "data" / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": asked})
    picture(tmp_path / "data" / "test2015" / "COCO_test2015_000000000001.jpg", 1)
    evaluate(answers, ["vqav2-testdev"], tmp_path / "data", tmp_path / "out")
    assert "No sample has a score of its own, so there is neither a best nor a worst." in report_of(tmp_path / "out")


def test_another_evaluation_in_its_place_leaves_no_report_of_the_first(answers, tmp_path: Path, monkeypatch) -> None:
    data, out = write_shards(tmp_path / "data", 2), tmp_path / "out"
    evaluate(answers, ["vqa"], data, out)

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlm.eval.run.write_evaluation", full)
    with pytest.raises(OSError, match="No space left"):
        evaluate(answers, ["caption"], data, out)
    assert not (out / "report.html").exists() and (out / "results.json").exists()


def test_half_a_character_is_no_reason_to_have_no_report(answers, tmp_path: Path) -> None:
    from vlm.eval.report_evaluation import write_evaluation

    evaluate(answers, ["vqa"], write_shards(tmp_path / "data", 1), tmp_path / "out")
    line = json.loads((tmp_path / "out" / "samples.jsonl").read_text("utf-8")) | {"prompt": "half \ud800 of it"}
    (tmp_path / "out" / "samples.jsonl").write_text(json.dumps(line))
    assert "half ? of it" in write_evaluation(tmp_path / "out").read_text("utf-8")
