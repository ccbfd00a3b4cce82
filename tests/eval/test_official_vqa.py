"""VQAv2, OK-VQA, TextVQA, VizWiz, GQA, ChartQA and DocVQA in the layout they are downloaded in, with scores worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlm.errors import UsageError
from vlm.eval import pictures
from vlm.eval.score import score_vqa

FILES = {
    "vqav2": ("v2_OpenEnded_mscoco_{}_questions.json", "v2_mscoco_{}_annotations.json"),
    "okvqa": ("OpenEnded_mscoco_{}_questions.json", "mscoco_{}_annotations.json"),
}
# Question id -> picture, words, the ten answers, kind of answer.
ASKED = {
    5: (41, "What colour?", ["red"] * 10, "other"),
    6: (41, "Is it big?", ["yes"] * 2 + ["no"] * 8, "yes/no"),
    7: (42, "How many?", ["2"] * 3 + ["two"] * 3 + ["3"] * 4, "number"),
}
SAID = {"What colour?": "Red", "Is it big?": "yes", "How many?": "Two."}


@pytest.fixture
def vqa(tmp_path: Path, picture, as_json):
    """Writes questions, annotations and pictures; gives the folder."""

    def write(task: str, split: str = "val2014") -> Path:
        questions = [{"question_id": i, "image_id": image, "question": text} for i, (image, text, *_) in ASKED.items()]
        annotations = [
            {
                "question_id": i,
                "image_id": image,
                "question_type": text.split()[0].lower(),
                "answer_type": kind,
                "answers": [
                    {"answer_id": n, "answer": a, "answer_confidence": "yes"} for n, a in enumerate(answers, 1)
                ],
            }
            for i, (image, text, answers, kind) in ASKED.items()
        ]
        folder = tmp_path / "data"
        as_json(folder / FILES[task][0].format(split), {"questions": questions})
        as_json(folder / FILES[task][1].format(split), {"annotations": annotations})
        for image in (41, 42):
            picture(folder / split / f"COCO_{split}_{image:012d}.jpg", image)
        return folder

    return write


def says(numbers: tuple[int, ...], prompt: str) -> str:
    return SAID[prompt.partition("\n")[0]]


@pytest.mark.parametrize("task", FILES)
def test_the_official_table_by_answer_and_question_type(task: str, vqa, run_task, puppet, tmp_path: Path) -> None:
    folder = vqa(task)
    metrics = run_task(puppet(says), task, folder)
    # "Red" is not the unanimous "red" letter for letter. "yes": two of ten said it; each of those has one other, each of the
    # eight two others: (2 · 1/3 + 8 · 2/3) / 10. "Two." becomes "2", as do the answers: six of ten, so 1.
    yes = (2 / 3 + 16 / 3) / 10
    assert metrics["overall"] == round(100 * (0 + yes + 1) / 3, 2)
    assert metrics["perAnswerType"] == {"other": 0.0, "yes/no": round(100 * yes, 2), "number": 100.0}
    assert metrics["perQuestionType"] == {"what": 0.0, "is": round(100 * yes, 2), "how": 100.0}
    assert metrics["n"] == 3
    official = json.loads((tmp_path / "out" / f"{task}_results.json").read_text())
    assert official == [{"question_id": i, "answer": SAID[text]} for i, (_, text, *_) in ASKED.items()]
    names = [folder / name.format("val2014") for name in FILES[task]]
    table = score_vqa(tmp_path / "out" / f"{task}_results.json", *names)["accuracy"]
    assert {name: metrics[name] for name in table} == table, "vlm score prints the same"
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [Path(*line["images"]).is_file() for line in lines] == [True] * 3, "so that a report can show them"


def test_a_picture_is_opened_and_encoded_once_for_all_its_questions(vqa, run_task, puppet, monkeypatch) -> None:
    model, opened = puppet(says), []
    open_image = pictures.open_image
    monkeypatch.setattr(
        pictures, "open_image", lambda source, **more: opened.append(source) or open_image(source, **more)
    )
    run_task(model, "vqav2", vqa("vqav2"))
    first, second = (turns[0]["content"][0]["image"] for turns in model.conversations[:2])
    assert first is second and sorted(opened) == sorted(set(opened)) and len(opened) == 2


def test_answers_that_are_not_public_make_a_file_to_hand_in_and_no_score(
    tmp_path: Path, picture, as_json, run_task, puppet
) -> None:
    asked = [{"question_id": 9, "image_id": 7, "question": "What?"}]
    as_json(tmp_path / "data" / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": asked})
    picture(tmp_path / "data" / "test2015" / "COCO_test2015_000000000007.jpg", 7)
    metrics = run_task(puppet(lambda numbers, prompt: "a dog "), "vqav2-testdev", tmp_path / "data")
    assert metrics == {"n": 1}
    official = json.loads((tmp_path / "out" / "vqav2-testdev_results.json").read_text())
    assert official == [{"question_id": 9, "answer": "a dog"}]


def test_ids_that_do_not_match_are_counted_and_named(vqa, run_task, puppet, as_json) -> None:
    folder = vqa("vqav2")
    path = folder / "v2_mscoco_val2014_annotations.json"
    annotations = json.loads(path.read_text())["annotations"]
    as_json(path, {"annotations": [annotations[0], annotations[1] | {"question_id": 99}]})
    said = r"does not match the question ids of .*: 2 of 3 missing \(6, 7\), 1 extra \(99\); download both again"
    with pytest.raises(UsageError, match=said):
        run_task(puppet(says), "vqav2", folder)
    as_json(path, {"annotations": [annotations[0]] * 2})
    with pytest.raises(UsageError, match=r"1 question_ids are given more than once \(5\)"):
        run_task(puppet(says), "vqav2", folder)


def test_textvqa_always_normalises(tmp_path: Path, picture, as_json, run_task, puppet) -> None:
    entries = [
        {"question_id": 1, "image_id": "ab", "question": "Brand?", "answers": ["the nokia"] * 10},
        {"question_id": 2, "image_id": "cd", "question": "Time?", "answers": ["10:30"] * 2 + ["ten"] * 8},
        {"question_id": 3, "image_id": "ef", "question": "Shop?", "answers": ["mcdonald's"] * 4 + ["mcdonalds"] * 6},
    ]
    as_json(tmp_path / "data" / "TextVQA_0.5.1_val.json", {"data": entries})
    for name, number in (("ab", 1), ("cd", 2), ("ef", 3)):
        picture(tmp_path / "data" / "train_images" / f"{name}.jpg", number)
    said = {1: "Nokia", 2: "10", 3: "McDonald 's"}
    metrics = run_task(puppet(lambda numbers, prompt: said[numbers[0]]), "textvqa", tmp_path / "data")
    # Unanimous answers are normalised too; "ten" is 10, said by eight; four write 's as it is written apart.
    assert metrics["accuracy"] == pytest.approx(1.0)
    official = json.loads((tmp_path / "out" / "textvqa_results.json").read_text())
    assert official == [{"question_id": number, "answer": answer} for number, answer in said.items()]


def test_vizwiz_by_answer_type(tmp_path: Path, picture, as_json, run_task, puppet) -> None:
    def entry(name: str, answers: list[str], kind: str) -> dict[str, Any]:
        told = [{"answer": answer, "answer_confidence": "yes"} for answer in answers]
        return {"image": name, "question": "What is it?", "answers": told, "answer_type": kind, "answerable": 1}

    entries = [
        entry("VizWiz_val_0.jpg", ["unanswerable"] * 10, "unanswerable"),
        entry("VizWiz_val_1.jpg", ["can", "can", *["soup"] * 8], "other"),
        entry("VizWiz_val_2.jpg", ["a pen"] * 10, "other"),
    ]
    as_json(tmp_path / "data" / "Annotations" / "val.json", entries)
    for number in (1, 2, 3):
        picture(tmp_path / "data" / "val" / f"VizWiz_val_{number - 1}.jpg", number)
    said = {1: "Unanswerable.", 2: "can", 3: "a pen"}
    metrics = run_task(puppet(lambda numbers, prompt: said[numbers[0]]), "vizwiz", tmp_path / "data")
    # Predictions lose their article, answers do not.
    can = (2 * 1 / 3 + 8 * 2 / 3) / 10
    assert metrics["accuracy_by_type"] == pytest.approx({"unanswerable": 1.0, "other": can / 2})
    assert metrics["accuracy"] == pytest.approx((1 + can) / 3)
    official = json.loads((tmp_path / "out" / "vizwiz_results.json").read_text())
    assert official[1] == {"image": "VizWiz_val_1.jpg", "answer": "can"}


def test_gqa_by_structural_type(tmp_path: Path, picture, as_json, run_task, puppet) -> None:
    def entry(image: str, question: str, answer: str, structural: str, semantic: str) -> dict[str, Any]:
        kinds = {"structural": structural, "semantic": semantic, "detailed": "-"}
        return {"imageId": image, "question": question, "answer": answer, "types": kinds}

    entries = {
        "201": entry("n1", "Is it red?", "yes", "verify", "attr"),
        "202": entry("n1", "What is left of it?", "dog", "query", "rel"),
        "203": entry("n2", "What is it?", "cat", "query", "cat"),
    }
    as_json(tmp_path / "data" / "testdev_balanced_questions.json", entries)
    for name, number in (("n1", 1), ("n2", 2)):
        picture(tmp_path / "data" / "images" / f"{name}.jpg", number)
    said = {"Is it red?": "Yes.", "What is left of it?": "a dog", "What is it?": "cat"}
    metrics = run_task(puppet(lambda numbers, prompt: said[prompt.partition("\n")[0]]), "gqa", tmp_path / "data")
    assert metrics["accuracy"] == pytest.approx(200 / 3)
    assert metrics["accuracy_by_structural"] == {"query": 50.0, "verify": 100.0}
    assert metrics["accuracy_by_semantic"] == {"attr": 100.0, "cat": 100.0, "rel": 0.0}
    assert (metrics["binary"], metrics["open"]) == (100.0, 50.0)
    official = json.loads((tmp_path / "out" / "gqa_results.json").read_text())
    assert official[0] == {"questionId": "201", "prediction": "yes"}


def test_chartqa_is_the_mean_of_human_and_augmented(tmp_path: Path, picture, as_json, run_task, puppet) -> None:
    human = [
        {"imgname": "a.png", "query": "How much?", "label": "100"},
        {"imgname": "a.png", "query": "Who?", "label": "Ann"},
    ]
    as_json(tmp_path / "data" / "test" / "test_human.json", human)
    as_json(tmp_path / "data" / "test" / "test_augmented.json", [{"imgname": "b.png", "query": "What?", "label": "40"}])
    picture(tmp_path / "data" / "test" / "png" / "a.png", 1)
    picture(tmp_path / "data" / "test" / "png" / "b.png", 2)
    said = {"How much?": "104", "Who?": "Bob", "What?": "43"}
    metrics = run_task(puppet(lambda numbers, prompt: said[prompt.partition("\n")[0]]), "chartqa", tmp_path / "data")
    # 104 lies within 5 % of 100; Bob is not Ann; 43 is 7.5 % off 40.
    assert metrics == {"relaxed_accuracy": 0.25, "human": 0.5, "augmented": 0.0, "n": 3}


def test_docvqa_is_anls(tmp_path: Path, picture, as_json, run_task, puppet) -> None:
    def entry(identity: int, answers: list[str]) -> dict[str, Any]:
        return {"questionId": identity, "question": f"Q{identity}?", "image": "documents/a.png", "answers": answers}

    as_json(tmp_path / "data" / "val_v1.0.json", {"data": [entry(1, ["March 4", "4 March"]), entry(2, ["house"])]})
    picture(tmp_path / "data" / "documents" / "a.png", 1)
    said = {"Q1?": "4 march", "Q2?": "horse"}
    metrics = run_task(puppet(lambda numbers, prompt: said[prompt.partition("\n")[0]]), "docvqa", tmp_path / "data")
    # The second answer of the first fits; one letter of five is another in the second.
    assert metrics["anls"] == pytest.approx((1 + 0.8) / 2)
    official = json.loads((tmp_path / "out" / "docvqa_results.json").read_text())
    assert official == [{"questionId": 1, "answer": "4 march"}, {"questionId": 2, "answer": "horse"}]
