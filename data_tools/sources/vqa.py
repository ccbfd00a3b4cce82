"""VQAv2: a file of questions and one of annotations, joined by question, each question with everybody's answer.

Knows the layout of the official files and how their pictures are named. Knows nothing of scoring.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from vlm.errors import UsageError

from .base import Record, Skipped, Source, need_file
from .json_stream import json_items, json_text
from .tables import Tables

# What the files tell is kept as JSON: an id may be a number or a word, and a word need not be valid Unicode.
_SCHEMA = """
CREATE TABLE images (number INTEGER PRIMARY KEY, id UNIQUE);
CREATE TABLE questions (number INTEGER PRIMARY KEY, id UNIQUE, image, told);
CREATE TABLE annotations (number INTEGER PRIMARY KEY, id UNIQUE, image, told);
"""
_ASKED = """
SELECT questions.id, questions.told, annotations.image, annotations.told FROM questions
LEFT JOIN annotations ON annotations.id = questions.id WHERE questions.image = ? ORDER BY questions.number
"""
_UNASKED = """
SELECT id FROM annotations WHERE NOT EXISTS (SELECT 1 FROM questions WHERE questions.id = annotations.id) ORDER BY number
"""


class VqaQuestions(Source):
    """A row is an image with all its questions and annotations; images are in the order in which they are first asked about.

    annotations: the file of answers. A question that nobody answered, and answers that nobody asked for, are Skipped. The
    key is the image's number in that order.
    """

    empty = "give v2_…_questions.json"
    options = ("annotations",)

    def __init__(self, src: Path, images: Path | None, annotations: Path | None = None) -> None:
        need_file(src)
        super().__init__(src, images)
        if annotations is None:
            raise UsageError(f"{src}: questions without answers; give --annotations v2_…_annotations.json")
        self.annotations = Path(annotations)
        need_file(self.annotations)
        stat = self.annotations.stat()
        self.version = stat.st_size, stat.st_mtime_ns  # among what an unfinished conversion is known by

    def rows(self, scratch: Path) -> Iterator[tuple[int, str, str | None, list[tuple[str, str]]] | Skipped]:
        """Number and id of an image, the part of the set it is in, and its questions with their annotations, as JSON."""
        part = next(json_items(self.src, "data_subtype"), None)
        with Tables(scratch, _SCHEMA) as tables:
            self._load(tables, self.src, "questions")
            self._load(tables, self.annotations, "annotations")
            tables.execute("CREATE INDEX questions_of_image ON questions (image, number)")
            for number, image in tables.execute("SELECT number, id FROM images ORDER BY number"):
                asked = []
                for id, question, answered_of, annotation in tables.execute(_ASKED, (image,)):
                    fault = self._mismatch(image, answered_of)
                    if fault:
                        yield Skipped(f"{self.src} question {id}: {fault}")
                    else:
                        asked.append((question, annotation))
                if asked:
                    yield number, image, part if isinstance(part, str) else None, asked
            for (id,) in tables.execute(_UNASKED):
                yield Skipped(
                    f"{self.annotations} question {id}: not in {self.src.name}; give the questions that belong"
                )
            yield from tables.skipped()

    def count(self) -> int:
        """Images, as if all questions about one stood together."""
        return sum(1 for _ in groupby(json_items(self.src, "questions.item"), _image_id))

    def records(self, row: tuple[int, str, str | None, list[tuple[str, str]]]) -> Iterator[Record | Skipped]:
        """The one sample of an image, with every question that can be used."""
        number, image = row[0], json.loads(row[1])
        place = f"{self.src} image {image}"
        picture = self._picture(place, image, row[2])
        qa = []
        for question, annotation in row[3]:
            entry, fault = _entry(json.loads(question), json.loads(annotation))
            if fault:
                yield Skipped(f"{self.annotations} question {entry['question_id']}: {fault}")
            else:
                qa.append(entry)
        if qa:
            fields = {"image": picture, "image_id": image, "qa": qa}
            yield Record(place, f"{number:08d}", fields, (self.image(picture),))

    def _load(self, tables: Tables, path: Path, kind: str) -> None:
        """Each of the list `kind` of a file into its table."""
        count = 0
        for count, entry in enumerate(json_items(path, f"{kind}.item"), start=1):
            place = f"{path} {count} of {kind}"
            if not isinstance(entry, dict) or not all(_is_id(entry.get(name)) for name in ("question_id", "image_id")):
                tables.skip(f'{place}: no "question_id" or no "image_id"; give both')
                continue
            id, image = json_text(path, entry["question_id"]), json_text(path, entry["image_id"])
            values = (count, id, image, json_text(path, entry))
            if not tables.put(f"INSERT OR IGNORE INTO {kind} VALUES (?, ?, ?, ?)", values):
                tables.skip(f"{place}: question_id {id} comes twice; give every question its own")
            elif kind == "questions":
                tables.put("INSERT OR IGNORE INTO images (id) VALUES (?)", (image,))
        if not count:
            raise UsageError(f'{path}: no "{kind}" in it; give v2_…_{kind}.json')

    def _mismatch(self, image: str, answered_of: str | None) -> str | None:
        if answered_of is None:
            return f"no answers in {self.annotations.name}; give the annotations that belong"
        if answered_of != image:
            return f"asked about image {image}, answered about {answered_of}; give the annotations that belong"
        return None

    def _picture(self, place: str, image: Any, part: str | None) -> str:
        """The name, under the folder of images, of the picture that is there."""
        names = [f"{image}.jpg"]
        if isinstance(image, int):
            names.insert(0, f"{image:012d}.jpg")
            if part:
                names[:0] = [f"COCO_{part}_{image:012d}.jpg", f"{part}/COCO_{part}_{image:012d}.jpg"]
        found = next((name for name in names if (self.images / name).is_file()), None)
        if found is None:
            raise UsageError(f"{place}: none of {', '.join(names)} in {self.images}; give their folder by --images")
        return found


def _entry(question: dict[str, Any], annotation: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """A question as samples have it, and why it can not be used."""
    given = annotation.get("answers")
    answers = [answer.get("answer") if isinstance(answer, dict) else answer for answer in _list(given)]
    entry = {
        "question": question.get("question"),
        "answers": answers,
        "question_id": question["question_id"],
        "type": annotation.get("answer_type") or annotation.get("question_type"),
        "question_type": annotation.get("question_type"),
    }
    if not _is_text(entry["question"]):
        return entry, "no text; fill it in"
    if not answers or not all(map(_is_text, answers)):
        return entry, f"{sum(map(_is_text, answers))} answers of {len(answers)} have a text; fill in the others"
    return entry, None


def _image_id(question: Any) -> Any:
    return question.get("image_id") if isinstance(question, dict) else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)
