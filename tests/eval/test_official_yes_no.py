"""POPE, MME, NLVR2 and NLVR in the layout they are downloaded in, with scores worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlm.errors import UsageError
from vlm.eval.tasks import TASKS
from vlm.eval.tasks.reading import read_lines
from vlm.eval.tasks.yes_no import COGNITION, PERCEPTION, POPE_SETS, _pope_answers, yes_or_no


def write_lines(path: Path, entries: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_pope_by_set(tmp_path: Path, picture, run_task, puppet) -> None:
    for kind in POPE_SETS:
        entries = [
            {"question_id": n, "image": "COCO_val2014_000000000007.jpg", "text": f"{kind} {n}?", "label": label}
            for n, label in enumerate(["yes", "yes", "no", "no"], 1)
        ]
        write_lines(tmp_path / "data" / f"coco_pope_{kind}.json", entries)
    picture(tmp_path / "data" / "val2014" / "COCO_val2014_000000000007.jpg", 7)
    said = {"random": ["Yes", "Yes", "No", "No"], "popular": ["Yes", "No", "Yes", "No"], "adversarial": ["Yes"] * 4}

    def reply(numbers: tuple[int, ...], prompt: str) -> str:
        kind, number = prompt.partition("?")[0].split()
        return said[kind][int(number) - 1]

    metrics = run_task(puppet(reply), "pope", tmp_path / "data")
    assert metrics["random"] == {"accuracy": 1.0, "precision": 1.0, "recall": 1.0, "f1": 1.0, "yes_share": 0.5}
    assert metrics["popular"] == {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_share": 0.5}
    assert metrics["adversarial"] == pytest.approx(
        {"accuracy": 0.5, "precision": 0.5, "recall": 1.0, "f1": 2 / 3, "yes_share": 1.0}
    )
    # Of all twelve: yes is said eight times, five of them right, of six.
    assert metrics["f1"] == pytest.approx(2 * (5 / 8) * (5 / 6) / (5 / 8 + 5 / 6))
    assert metrics["accuracy"] == pytest.approx(8 / 12)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_of_json_ends_at_a_line_break_alone(end: str, tmp_path: Path) -> None:
    entries = [{"text": f"a{mark}b"} for mark in "\u2028\u2029\x85\x0c\n "]
    lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
    (tmp_path / "lines.jsonl").write_bytes((end.join(lines) + end + end).encode("utf-8-sig"))
    assert read_lines(tmp_path / "lines.jsonl") == entries


def test_replies_are_read_as_the_scripts_read_them() -> None:
    pope = {
        "No, there is.": "no",
        "There is not a dog": "no",
        "Yes. No.": "yes",
        "I see a dog": "yes",
        "nothing": "yes",
    }
    assert _pope_answers([], list(pope)) == list(pope.values())
    mme = {"Yes, it is": "yes", " no": "no", "I think yes": "", "": "", "NO.": "no"}
    assert yes_or_no([], list(mme)) == list(mme.values())


@pytest.fixture
def mme(tmp_path: Path, picture) -> Path:
    """Two pictures a subtask, each with a question to say yes to and one to say no to; half in folders of their own."""
    for place, name in enumerate((*PERCEPTION, *COGNITION)):
        folder = tmp_path / "data" / name
        told, shown = (folder / "questions_answers_YN", folder / "images") if place % 2 else (folder, folder)
        told.mkdir(parents=True, exist_ok=True)
        for number in (1, 2):
            lines = [f"Is it {number}? Please answer yes or no.\tYes", "Is it 9? Please answer yes or no.\tNo"]
            (told / f"p{number}.txt").write_text("\n".join(lines))
            picture(shown / f"p{number}.{'png' if number == 1 else 'jpg'}", number)
    return tmp_path / "data"


def test_mme_has_accuracy_plus_and_sums(mme: Path, run_task, puppet) -> None:
    # Right on the first picture, says yes to everything on the second: 3 of 4 right, one of two pictures all right.
    reply = lambda numbers, prompt: "Yes" if numbers[0] == 2 or f"it {numbers[0]}?" in prompt else "No"  # noqa: E731
    metrics = run_task(puppet(reply), "mme", mme)
    assert metrics["subtasks"]["OCR"] == {"accuracy": 75.0, "accuracy_plus": 50.0, "score": 125.0}
    assert (metrics["perception"], metrics["cognition"], metrics["score"]) == (1250.0, 500.0, 1750.0)
    assert metrics["n"] == 14 * 4


def test_a_question_of_mme_may_hold_a_line_separator(mme: Path) -> None:
    (path,) = mme.glob("OCR/**/p2.txt")
    path.write_text("Is it\u2028a\x85dog?\tYes\r\nIs it a cat?\tNo\r\n", "utf-8")
    asked = [one for one in TASKS["mme"].examples(mme) if one.id.startswith("OCR/p2/")]
    assert [(one.question, one.answers) for one in asked] == [
        ("Is it\u2028a\x85dog?", ("yes",)),
        ("Is it a cat?", ("no",)),
    ]


def test_mme_without_a_subtask_has_no_score(mme: Path, run_task, puppet, tmp_path: Path) -> None:
    (mme / "OCR").rename(tmp_path / "away")
    with pytest.raises(UsageError, match=r"1 of 14 subtasks are missing \(OCR\); finish the download"):
        run_task(puppet(), "mme", mme)


def test_nlvr2_shows_both_pictures(tmp_path: Path, picture, run_task, puppet) -> None:
    entries = [
        {"sentence": "Both are dark.", "identifier": "dev-0-0-0", "label": "True"},
        {"sentence": "Both are dark.", "identifier": "dev-0-1-0", "label": "False"},
        {"sentence": "One is light.", "identifier": "dev-0-1-1", "label": "True"},
    ]
    write_lines(tmp_path / "data" / "data" / "dev.json", entries)
    for pair, numbers in ((0, (1, 2)), (1, (3, 200))):
        for side in (0, 1):
            picture(tmp_path / "data" / "dev" / f"dev-0-{pair}-img{side}.png", numbers[side])
    reply = lambda numbers, prompt: "yes" if max(numbers) < 100 or "light" in prompt else "yes, both"  # noqa: E731
    model = puppet(reply)
    metrics = run_task(model, "nlvr2", tmp_path / "data")
    assert sorted(model._asked(turns[-1])[0] for turns in model.conversations) == [(1, 2), (3, 200), (3, 200)]
    # The second is wrong; its sentence is right with the other pair, so it is not consistent.
    assert metrics == {"accuracy": pytest.approx(2 / 3), "consistency": 0.5, "n": 3}


def test_nlvr_judges_all_six_orders(tmp_path: Path, picture, run_task, puppet) -> None:
    entries = [{"sentence": "A box is red.", "identifier": "72-0", "directory": "5", "label": "true", "evals": {}}]
    write_lines(tmp_path / "data" / "dev" / "dev.json", entries)
    for order in range(6):
        picture(tmp_path / "data" / "dev" / "images" / "5" / f"dev-72-0-{order}.png", order + 1)
    metrics = run_task(puppet(lambda numbers, prompt: "no" if numbers == (6,) else "yes"), "nlvr", tmp_path / "data")
    assert metrics == {"accuracy": pytest.approx(5 / 6), "consistency": 0.0, "n": 6}
