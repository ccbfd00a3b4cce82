"""`vlm eval compare`: what changed between two evaluations, and a clear refusal of what does not compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from vlm.errors import UsageError
from vlm.eval.compare import compare, summary


def evaluation(folder: Path, **scores: list[Any]) -> Path:
    """An evaluation folder as `vlm eval` leaves it, of tasks with these item scores."""
    folder.mkdir(exist_ok=True)
    lines = [
        {"task": task, "id": n, "key": f"{n:04}", "prediction": "x", "references": ["red"], "score": score}
        for task, each in scores.items()
        for n, score in enumerate(each)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    tasks = {task: {"n": len(each)} for task, each in scores.items()}
    (folder / "results.json").write_text(json.dumps({"model": f"model of {folder.name}", "tasks": tasks}), "utf-8")
    return folder


def test_each_task_has_means_intervals_a_difference_and_a_p_value(tmp_path: Path) -> None:
    a = evaluation(tmp_path / "a", vqa=[1.0, 0, 0, 1, 0] * 10, caption=[0.5, 1.5, 0.25] * 10)
    b = evaluation(tmp_path / "b", vqa=[1.0, 1, 0, 0, 1] * 10, caption=[0.75, 1.5, 0.5] * 10)
    found = compare(a, b)
    vqa, caption = found["tasks"]["vqa"], found["tasks"]["caption"]
    assert found["models"] == ["model of a", "model of b"]
    assert (vqa["a"]["value"], vqa["b"]["value"]) == pytest.approx((0.4, 0.6))
    assert vqa["difference"]["value"] == pytest.approx(0.2)
    assert vqa["difference"]["low"] < 0.2 < vqa["difference"]["high"]
    assert (vqa["test"], vqa["p"]) == ("mcnemar", pytest.approx(stats.binomtest(10, 30).pvalue))
    assert (vqa["n"], vqa["up"], vqa["down"], vqa["same"]) == (50, 20, 10, 20)
    assert caption["test"] == "permutation" and caption["p"] < 0.001
    assert json.loads(json.dumps(found)) == found


def test_the_summary_has_one_line_a_task(tmp_path: Path) -> None:
    a = evaluation(tmp_path / "a", vqa=[1.0, 0.0] * 10, perplexity=["inf", None])
    b = evaluation(tmp_path / "b", vqa=[1.0, 1.0] * 10, perplexity=[3.0, 4.0])
    lines = summary(compare(a, b)).splitlines()
    assert lines[0] == f"a  {a}  model of a"
    assert "vqa: a 0.500 [" in lines[2] and "b - a +0.500 [" in lines[2] and "p = 0.002 (mcnemar)" in lines[2]
    assert "up 10, down 0, same 10 (n = 20)" in lines[2]
    assert lines[3] == "perplexity: 2 of 2 items have no finite score of their own"


def test_the_order_of_items_does_not_matter(tmp_path: Path) -> None:
    a, b = evaluation(tmp_path / "a", vqa=[1.0, 0.0, 0.3]), evaluation(tmp_path / "b", vqa=[0.0, 0.0, 1.0])
    before = compare(a, b)
    lines = (b / "samples.jsonl").read_text("utf-8").splitlines(keepends=True)
    (b / "samples.jsonl").write_text("".join(lines[::-1]), "utf-8")
    assert compare(a, b) == before


def test_other_items_are_counted_and_named(tmp_path: Path) -> None:
    a = evaluation(tmp_path / "a", vqa=[1.0] * 9)
    with pytest.raises(UsageError, match=r"4 of 9 missing \(vqa 5, vqa 6, vqa 7, …\), 2 of 7 extra \(nlvr 0, nlvr 1\)"):
        compare(a, evaluation(tmp_path / "b", vqa=[1.0] * 5, nlvr=[0.0] * 2))
    b = evaluation(tmp_path / "b", vqa=[1.0] * 9)
    text = (b / "samples.jsonl").read_text("utf-8")
    (b / "samples.jsonl").write_text(text.replace('"red"', '"blue"', 2), "utf-8")
    with pytest.raises(UsageError, match=r"2 with another sample or other references \(vqa 0, vqa 1\)"):
        compare(a, b)


def test_what_is_no_whole_evaluation_is_refused(tmp_path: Path) -> None:
    a, b = evaluation(tmp_path / "a", vqa=[1.0, 0.0]), evaluation(tmp_path / "b", vqa=[1.0, 0.0])
    with pytest.raises(UsageError, match="nowhere.results.json: can not be read"):
        compare(a, tmp_path / "nowhere")
    whole = (b / "samples.jsonl").read_text("utf-8")
    first = whole.splitlines(keepends=True)[0]
    for text, said in (
        (first, r"1 items of vqa, 2 in results.json"),
        (whole[:-20], r"samples.jsonl:2: not JSON"),
        (whole + first, r"samples.jsonl:3: item 0 of vqa stands in it twice"),
        ("{}\n", r"samples.jsonl:1: has no task and id"),
        ("", r"holds 0 items"),
    ):
        (b / "samples.jsonl").write_text(text, "utf-8")
        with pytest.raises(UsageError, match=said) as caught:
            compare(a, b)
        assert "\n" not in str(caught.value)
    for text, said in (("[]", 'no "tasks"'), ("{", "not JSON")):
        (b / "results.json").write_text(text, "utf-8")
        with pytest.raises(UsageError, match=said):
            compare(a, b)
