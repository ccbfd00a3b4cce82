"""`vlm score` on the official layouts: the numbers, and a clear refusal of files that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlm.errors import UsageError
from vlm.eval.bench import bench_score
from vlm.eval.score import score_caption, score_vqa

GOLDENS = Path(__file__).parent / "goldens"


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), "utf-8")
    return path


@pytest.fixture
def vqa(tmp_path: Path) -> dict[str, Path]:
    golden = json.loads((GOLDENS / "vqa.json").read_text("utf-8"))
    asked = [{"image_id": 1, "question": "What?", "question_id": a["question_id"]} for a in golden["annotations"]]
    return {
        "results": write(tmp_path / "results.json", golden["results"]),
        "questions": write(tmp_path / "questions.json", {"info": {}, "questions": asked}),
        "annotations": write(tmp_path / "annotations.json", {"info": {}, "annotations": golden["annotations"]}),
    }


@pytest.fixture
def captions(tmp_path: Path) -> dict[str, Path]:
    golden = json.loads((GOLDENS / "captions.json").read_text("utf-8"))
    pairs = [(i, caption) for i, picture in enumerate(golden["pictures"]) for caption in picture["references"]]
    truths = [{"image_id": i, "id": n, "caption": caption} for n, (i, caption) in enumerate(pairs)]
    said = [{"image_id": i, "caption": picture["candidate"]} for i, picture in enumerate(golden["pictures"])]
    return {
        "results": write(tmp_path / "said.json", said),
        "annotations": write(tmp_path / "captions.json", {"images": [], "annotations": truths}),
    }


def test_vqa_prints_the_official_numbers(vqa: dict[str, Path], tmp_path: Path) -> None:
    scores = score_vqa(**vqa, out=tmp_path / "out" / "scores.json")
    assert scores["accuracy"] == json.loads((GOLDENS / "vqa.json").read_text("utf-8"))["accuracy"]
    assert scores["mode"] == "official"
    assert json.loads((tmp_path / "out" / "scores.json").read_text("utf-8")) == scores


def test_the_mode_is_named_in_the_output(vqa: dict[str, Path]) -> None:
    official, lmms = score_vqa(**vqa), score_vqa(**vqa, mode="lmms")
    assert (official["mode"], lmms["mode"]) == ("official", "lmms")
    assert official["accuracy"] != lmms["accuracy"]
    with pytest.raises(UsageError, match="mode 'mmf' is unknown; choose of official, lmms"):
        score_vqa(**vqa, mode="mmf")


def test_captions_get_the_official_numbers(captions: dict[str, Path], tmp_path: Path) -> None:
    scores = score_caption(**captions, out=tmp_path / "scores.json")
    golden = json.loads((GOLDENS / "captions.json").read_text("utf-8"))["metrics"]
    assert scores["metrics"] == pytest.approx(golden, abs=1e-12)
    assert scores["CIDEr_is"].startswith("CIDEr-D, sigma 6")
    assert json.loads((tmp_path / "scores.json").read_text("utf-8")) == scores


def test_the_order_of_predictions_does_not_matter(vqa: dict[str, Path]) -> None:
    before = score_vqa(**vqa)
    write(vqa["results"], json.loads(vqa["results"].read_text("utf-8"))[::-1])
    assert score_vqa(**vqa) == before


def test_captions_are_read_in_the_order_of_the_images(tmp_path: Path) -> None:
    """As the official program goes: what follows a letter at a caption's end tells whether it is an initial."""
    truths = [{"image_id": 1, "caption": "vitamin C."}, {"image_id": 2, "caption": "Big red dog"}]
    said = write(tmp_path / "said.json", [{"image_id": 1, "caption": "x"}, {"image_id": 2, "caption": "vitamin c"}])
    scores = []
    for order in ([1, 2], [2, 1]):
        content = {"images": [{"id": n} for n in order], "annotations": truths}
        truths_file = write(tmp_path / "captions.json", content)
        said = write(said, [{"image_id": 1, "caption": "vitamin c"}, {"image_id": 2, "caption": "x"}])
        scores.append(score_caption(said, truths_file)["metrics"]["Bleu_1"])
    assert scores[0] < scores[1]


def test_an_unknown_java_metric_is_refused(captions: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="metric 'BLEURT' is unknown; choose of METEOR, SPICE"):
        score_caption(**captions, java=["BLEURT"])


def test_ids_that_are_no_numbers_are_refused(vqa: dict[str, Path], captions: dict[str, Path]) -> None:
    for odd in ("7", 7.5, None, [7]):
        write(vqa["questions"], {"questions": [{"question_id": 7}, {"question_id": odd}]})
        with pytest.raises(UsageError, match="question_id .* is not a whole number"):
            score_vqa(**vqa)
        write(captions["annotations"], {"annotations": [{"image_id": odd, "caption": "x"}]})
        with pytest.raises(UsageError, match="annotations.0. has no "):
            score_caption(**captions)


def test_missing_and_extra_images_are_counted_and_named(captions: dict[str, Path]) -> None:
    said = json.loads(captions["results"].read_text("utf-8"))
    write(captions["results"], said[2:] + [{"image_id": 9001, "caption": "x"}])
    with pytest.raises(UsageError, match=r"2 of 80 missing \(0, 1\), 1 extra \(9001\)"):
        score_caption(**captions)


def test_the_benchmark_measures_both() -> None:
    rows = bench_score(questions=20, pictures=10)
    assert [row.name for row in rows] == ["score vqa", "score caption"]
    assert all(row.ours > 0 and row.unit == "s" for row in rows)


def test_missing_and_extra_ids_are_counted_and_named(vqa: dict[str, Path], tmp_path: Path) -> None:
    results = json.loads(vqa["results"].read_text("utf-8"))
    write(vqa["results"], results[5:] + [{"question_id": 9001, "answer": "x"}])
    with pytest.raises(UsageError, match=r"5 of 500 missing \(0, 1, 2, …\), 1 extra \(9001\)") as caught:
        score_vqa(**vqa, out=tmp_path / "scores.json")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "scores.json").exists()


def test_ids_given_twice_are_named(vqa: dict[str, Path], captions: dict[str, Path]) -> None:
    for files, score, name in ((vqa, score_vqa, "question_id"), (captions, score_caption, "image_id")):
        results = json.loads(files["results"].read_text("utf-8"))
        write(files["results"], results + results[:2])
        with pytest.raises(UsageError, match=rf"2 {name}s are given more than once \(0, 1\)"):
            score(**files)


def test_questions_and_annotations_must_belong_together(vqa: dict[str, Path]) -> None:
    questions = json.loads(vqa["questions"].read_text("utf-8"))
    write(vqa["questions"], questions | {"questions": questions["questions"][:-1]})
    with pytest.raises(UsageError, match=r"annotations.json: .* 1 extra \(499\)"):
        score_vqa(**vqa)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "holds 0 predictions"),
        ({"answers": []}, "holds a dict"),
        ([{"question_id": "7", "answer": "x"}], "entry 0 is"),
        ([{"question_id": 7, "answer": None}], "entry 0 is"),
        ([{"question_id": True, "answer": "x"}], "entry 0 is"),
        (["yes"], "entry 0 is"),
    ],
)
def test_other_things_than_predictions_are_refused(vqa: dict[str, Path], content: Any, said: str) -> None:
    write(vqa["results"], content)
    with pytest.raises(UsageError, match=said):
        score_vqa(**vqa)


def test_files_of_another_kind_are_refused(vqa: dict[str, Path], captions: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='no list "annotations"'):
        score_vqa(**vqa | {"annotations": vqa["questions"]})
    with pytest.raises(UsageError, match=r"annotations\[0\] has no question_id"):
        score_vqa(**vqa | {"annotations": captions["annotations"]})
    with pytest.raises(UsageError, match="no such file"):
        score_caption(captions["results"], tmp_path / "nowhere.json")
    captions["annotations"].write_text('{"annotations": [{"image_id": 1,', "utf-8")
    with pytest.raises(UsageError, match="not JSON"):
        score_caption(**captions)


def test_annotations_without_answers_are_refused(vqa: dict[str, Path]) -> None:
    content = json.loads(vqa["annotations"].read_text("utf-8"))
    content["annotations"][3]["answers"] = []
    write(vqa["annotations"], content)
    with pytest.raises(UsageError, match="question 3 has no list of answers"):
        score_vqa(**vqa)
