"""Multiple choice on pictures: ScienceQA-IMG, MMBench, MMStar, SEED-Bench (pictures), AI2D.

Knows these layouts:

* `scienceqa`, https://github.com/lupantech/ScienceQA: problems.json, pid_splits.json, and images/test/ID/image.png or
  test/ID/image.png; the problems of the test split that have a picture.
* `mmbench`, https://github.com/open-compass/MMBench: MMBench_DEV_EN.tsv, mmbench_dev_20230712.tsv or MMBench_DEV_EN_V11.tsv,
  pictures in base64 in the column image (held so, decoded when wanted). `mmbench-circular` asks each question once for every
  rotation of its options, and counts it only where all are right (CircularEval, Liu et al. 2024).
* `mmstar`, https://huggingface.co/datasets/Lin-Chen/MMStar: mmstar.parquet, options inside the question.
* `seed`, https://huggingface.co/datasets/AILab-CVC/SEED-Bench: SEED-Bench.json and SEED-Bench-image/; the questions whose
  data_type is image.
* `ai2d`, https://prior.allenai.org/projects/diagram-understanding: questions/1.png.json, images/1.png, abc_images/1.png for
  questions on letters, and ai2d_test_ids.csv, which names the pictures of the test split.

Accuracies are in [0, 1].
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from vlm.errors import UsageError

from .base import Item, Scored, letter
from .benchmark import Benchmark, Example
from .choosing import WAYS, mean, mean_by, share_right
from .reading import files, first_of, read_json, read_parquet, read_table, section

# -------------------------------------------------------------------------------------------------------- ScienceQA


def _read_scienceqa(folder: Path, split: str) -> Iterator[Example]:
    problems_file, splits_file = files(folder, "problems.json", "pid_splits.json")
    problems = read_json(problems_file)
    place = first_of(folder, f"images/{split}", split)
    for identity in read_json(splits_file)[split]:
        problem = problems[identity]
        if problem["image"]:
            yield Example(
                id=int(identity),
                images=(place / identity / problem["image"],),
                question=problem["question"],
                answers=(letter(problem["answer"]),),
                options=tuple(problem["choices"]),
                context=problem["hint"],
                key=f"{split}/{identity}",
                about={"subject": problem["subject"], "grade": _grades(problem["grade"])},
            )


def _grades(grade: str) -> str:
    return "grade 1-6" if int(grade.removeprefix("grade")) <= 6 else "grade 7-12"


# ---------------------------------------------------------------------------------------------------------- MMBench


def _read_mmbench(folder: Path) -> Iterator[Example]:
    path = first_of(folder, "MMBench_DEV_EN.tsv", "mmbench_dev_2*.tsv", "MMBench_DEV_EN_V11.tsv")
    rows = read_table(path)
    pictures = {row["index"]: partial(base64.b64decode, row["image"]) for row in rows}
    for row in rows:
        # A picture that several questions are on may stand in one row, and the index of that row in the others.
        yield Example(
            id=int(row["index"]),
            images=(pictures.get(row["image"], pictures[row["index"]]),),
            question=row["question"],
            answers=(row["answer"],),
            options=tuple(row[name] for name in "ABCD" if row.get(name)),
            context=row.get("hint") or "",
            type=row["category"],
            about={
                "category": row["category"],
                "group": row.get("l2-category") or row["category"],
                "question": row["index"],
            },
        )


def _rotated(folder: Path) -> Iterator[Example]:
    """Every question once for each rotation of its options; the ids are those of the original plus a million each."""
    for example in _read_mmbench(folder):
        right = ord(example.answers[0]) - ord("A")
        for turn in range(count := len(example.options)):
            yield replace(
                example,
                id=int(example.id) + turn * 10**6,
                options=example.options[turn:] + example.options[:turn],
                answers=(letter((right - turn) % count),),
            )


def _all_rotations_right(items: Sequence[Item], answers: Sequence[str]) -> Scored:
    each = share_right()(items, answers)
    whole: dict[str, tuple[str, float]] = {}
    for item, score in zip(items, each.scores, strict=True):
        _, before = whole.get(item.about["question"], ("", 1.0))
        whole[item.about["question"]] = item.about["category"], min(before, score or 0.0)
    kinds, scores = zip(*whole.values(), strict=True)
    metrics = {"accuracy": mean(scores), "accuracy_by_category": mean_by(kinds, scores)}
    return replace(each, metrics=metrics | {"accuracy_single": each.metrics["accuracy"], "questions": len(whole)})


# ----------------------------------------------------------------------------------------------------------- MMStar


def _read_mmstar(folder: Path) -> Iterator[Example]:
    (path,) = files(folder, "mmstar.parquet")
    table = read_parquet(path)
    pictures = table.column("image")
    for place, row in enumerate(table.drop_columns(["image"]).to_pylist()):
        question, options = _split_options(row["question"])
        yield Example(
            id=row["index"],
            images=(partial(_cell, pictures, place),),
            question=question,
            answers=(row["answer"],),
            options=options,
            type=row["category"],
            about={"category": row["category"], "subcategory": row["l2_category"]},
        )


def _cell(column: Any, place: int) -> bytes:
    value = column[place].as_py()
    return value["bytes"] if isinstance(value, dict) else value


def _split_options(text: str) -> tuple[str, tuple[str, ...]]:
    """`QUESTION Options: A: …, B: …, C: …, D: …` -> the question and its options."""
    question, found, listed = text.rpartition("Options:")
    pieces = re.split(r"(?:^|,?\s+)([A-H]): ", listed.strip())[1:]
    names, options = pieces[0::2], pieces[1::2]
    if not found or names != [letter(place) for place in range(len(names))]:
        raise UsageError(f"question {text[:60]!r} lists no options A: …, B: …; give the official mmstar.parquet")
    return question.strip(), tuple(option.strip() for option in options)


# ------------------------------------------------------------------------------------------------------- SEED, AI2D


def _read_seed(folder: Path) -> Iterator[Example]:
    (path,) = files(folder, "SEED-Bench.json")
    content = read_json(path)
    kinds = {number: name for name, number in content["question_type"].items()}
    for entry in section(path, content, "questions"):
        if entry["data_type"] == "image":
            yield Example(
                id=str(entry["question_id"]),
                images=(folder / "SEED-Bench-image" / entry["data_id"],),
                question=entry["question"],
                answers=(entry["answer"],),
                options=tuple(entry[f"choice_{name}"] for name in "abcd"),
                about={"type": kinds[entry["question_type_id"]]},
            )


def _read_ai2d(folder: Path) -> Iterator[Example]:
    (path,) = files(folder, "ai2d_test_ids.csv")
    names = path.read_text("utf-8").split()
    for sheet in files(folder, *(f"questions/{name}.png.json" for name in names)):
        content = read_json(sheet)
        for question, entry in content["questions"].items():
            shown = "abc_images" if entry["abcLabel"] else "images"
            yield Example(
                id=entry["questionId"],
                images=(folder / shown / content["imageName"],),
                question=question,
                answers=(letter(entry["correctAnswer"]),),
                options=tuple(map(str, entry["answerTexts"])),
            )


MMBENCH = Benchmark(
    name="mmbench",
    headline="accuracy",
    read=_read_mmbench,
    ways=WAYS,
    metric=share_right("group", "category"),
)
BENCHMARKS = (
    Benchmark(
        name="scienceqa",
        headline="accuracy",
        read=partial(_read_scienceqa, split="test"),
        train=partial(_read_scienceqa, split="train"),
        ways=WAYS,
        metric=share_right("subject", "grade"),
    ),
    MMBENCH,
    replace(MMBENCH, name="mmbench-circular", read=_rotated, metric=_all_rotations_right),
    Benchmark(
        name="mmstar",
        headline="accuracy",
        read=_read_mmstar,
        ways=WAYS,
        metric=share_right("category", "subcategory"),
    ),
    Benchmark(name="seed", headline="accuracy", read=_read_seed, ways=WAYS, metric=share_right("type")),
    Benchmark(name="ai2d", headline="accuracy", read=_read_ai2d, ways=WAYS, metric=share_right()),
)
