"""The formats of `vlm data convert`, each from its official layout: what comes out, every fault, and memory."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import pickle
import sys
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from PIL import Image

from vlm.data_tools.convert import Converted, convert
from vlm.data_tools.engines import LocalEngine
from vlm.data_tools.sources import SOURCES, Record, Skipped, open_source
from vlm.errors import UsageError
from vlm.samples import parse_sample
from vlm.shards import Shards


def encoded(number: int, kind: str = "JPEG") -> bytes:
    """A picture like no other."""
    drawn = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(drawn).save(file, kind)
    return file.getvalue()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with `0.jpg` to `4.jpg`."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.jpg").write_bytes(encoded(number))
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file: bytes and text as they are, all else as JSON."""

    def to(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, bytes | str):
            content = json.dumps(content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return to


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., tuple[list[Record], list[Skipped]]]:
    """The records of a source and what it skips, as another process would see them: source and rows are pickled."""

    def of(format: str, src: Path, images: Path | None = None, **options: Any) -> tuple[list[Record], list[Skipped]]:
        source = open_source(format, src, images, **options)
        rows = [pickle.loads(pickle.dumps(row)) for row in source.rows(tmp_path / "scratch")]
        assert rows == list(source.rows(tmp_path / "scratch")), "rows come again as they came"
        source = pickle.loads(pickle.dumps(source))
        found: list[Record | Skipped] = []
        for row in rows:
            try:
                found += [row] if isinstance(row, Skipped) else source.records(row)
            except UsageError as error:
                found.append(Skipped(str(error)))
        records = [one for one in found if isinstance(one, Record)]
        skipped = [one for one in found if isinstance(one, Skipped)]
        assert len({record.key for record in records}) == len(records) and not any("." in one.key for one in records)
        assert all("\n" not in one.reason for one in skipped)
        return records, skipped

    return of


def bytes_of(record: Record) -> list[bytes]:
    return [image if isinstance(image, bytes) else Path(image).read_bytes() for image in record.images]


def says(skipped: list[Skipped], *parts: str) -> bool:
    """Whether there is one thing skipped, and its reason has all these parts."""
    return len(skipped) == 1 and all(part in skipped[0].reason for part in parts)


# CSV and TSV


TABLE = 'image,caption,licence\n0.jpg,"one, ""quoted"",\non two lines",CC0\n\n1.jpg,ünïcode,\n'


@pytest.mark.parametrize(
    "separator, name", [(",", "a.csv"), (";", "a.csv"), ("\t", "a.tsv"), ("\t", "a.csv"), (",", "a.tsv")]
)
@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_csv_however_it_was_saved(separator, name, start, newline, read, write, pictures):
    file = io.StringIO()
    rows = list(csv.reader(TABLE.splitlines(keepends=True)))
    csv.writer(file, delimiter=separator, lineterminator=newline).writerows(row for row in rows if row)
    records, skipped = read("csv", write(name, start + file.getvalue()), pictures)
    assert [record.fields for record in records] == [
        {"image": "0.jpg", "caption": 'one, "quoted",\non two lines', "licence": "CC0"},
        {"image": "1.jpg", "caption": "ünïcode"},
    ]
    assert [bytes_of(record) for record in records] == [[encoded(0)], [encoded(1)]]
    assert [record.key for record in records] == ["00000002", "00000004"] and not skipped


def test_csv_columns_are_named_by_the_user(read, write, pictures):
    path = write("a.csv", "id,filepath,title,caption\n7,2.jpg,the title,the caption\n")
    (record,), _ = read("csv", path, pictures, columns={"image": "filepath", "caption": "title"})
    assert record.fields == {"id": "7", "image": "2.jpg", "caption": "the title"}
    assert record.place == f"{path} line 2"


def test_csv_with_questions_several_images_and_unnamed_columns(read, write, pictures):
    cells = ("", '["0.jpg", "1.jpg"]', "Which?", '["left", "right"]', "12")
    file = io.StringIO()
    csv.writer(file).writerows([("", "images", "question", "answers", "question_id"), cells])
    (record,), _ = read("csv", write("a.csv", file.getvalue()), pictures)
    assert bytes_of(record) == [encoded(0), encoded(1)]
    sample = parse_sample("k", {"0.jpg": b"", "1.jpg": b"", "json": json.dumps(record.fields).encode()})
    assert sample.questions[0].answers == ("left", "right") and sample.questions[0].id == 12


CSV_ROWS = {
    "too many cells": (b"0.jpg,a red, kite", "line 2: 3 cells, the first line names 2", "quote cells that hold a comma"),
    "too few cells": (b"0.jpg", "line 2: 1 cells, the first line names 2", "quote cells"),
    "no image": (b",a kite", "line 2: no image", "give its path under 'image'"),
    "no caption": (b"0.jpg, ", "line 2: a picture without caption, question or text", "fill one in"),
    "not UTF-8": (b"0.jpg,caf\xe9", "line 2: column 'caption' is not UTF-8", "save it as UTF-8"),
    "an address": (b"http://x/0.jpg,a", "image http://x/0.jpg: an address", "download them with img2dataset first"),
    "a stray quote": (b'0.jpg,"a" kite', "line 2: ',' expected after '\"'", "close every quote"),
    "an endless cell": (b'0.jpg,"' + b"x" * 200_000 + b'"', "line 2: field larger than field limit", "close every quote"),
}  # fmt: skip


@pytest.mark.parametrize("fault", CSV_ROWS)
def test_csv_row_that_can_not_be_used(fault, read, write, pictures):
    row, what, mend = CSV_ROWS[fault]
    records, skipped = read("csv", write("a.csv", b"image,caption\n" + row + b"\n1.jpg,good\n"), pictures)
    assert [record.fields["caption"] for record in records] == ["good"]
    assert says(skipped, what, mend)


def test_csv_quote_that_is_never_closed_names_the_lines(read, write, pictures):
    records, skipped = read("csv", write("a.csv", 'image,caption\n0.jpg,a\n1.jpg,"b\n2.jpg,c\n3.jpg,d\n'), pictures)
    assert [record.fields["caption"] for record in records] == ["a"]
    assert says(skipped, "a.csv lines 3 to 5: unexpected end of data; close every quote")


CSV_FILES = {
    "empty": (b"", {}, "no column names in its first line; write image,caption there"),
    "UTF-16": ("image,caption\n".encode("utf-16"), {}, "UTF-16; save it as UTF-8"),
    "no image": (b"file,caption\na,b\n", {}, "no column 'image' among file, caption; name it with --column image=NAME"),
    "no caption": (b"image,title\na,b\n", {}, "no column 'caption' among image, title; name it with --column caption=NAME"),
    "twice": (b"image,caption,caption\n", {}, "column 'caption' comes twice; rename one"),
    "no such column": (
        b"image,title\na,b\n",
        {"caption": "name"},
        "no column 'name' among image, title; give --column caption=NAME",
    ),
    "quotes": (b'image,"cap"tion\n', {}, "close every quote"),
}  # fmt: skip


@pytest.mark.parametrize("fault", CSV_FILES)
def test_csv_that_can_not_be_used(fault, read, write, pictures):
    content, columns, message = CSV_FILES[fault]
    with pytest.raises(UsageError) as refusal:
        read("csv", write("a.csv", content), pictures, **({"columns": columns} if columns else {}))
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_csv_list_that_is_none(read, write, pictures):
    _, skipped = read("csv", write("a.csv", "images,caption\n0.jpg,b\n"), pictures)
    assert says(skipped, "column 'images' holds no list; write it as JSON")


# COCO captions


def coco(images: int, captions: int = 5, **more: Any) -> dict[str, Any]:
    """captions_*.json: ids that are not in order, and annotations of one image that do not stand together."""
    ids = [(number * 7919 + 13) % 100_003 for number in range(images)]
    listed = [{"license": 1, "file_name": f"{n}.jpg", "height": 8, "width": 8, "id": id} for n, id in enumerate(ids)]
    said = [
        {"image_id": id, "id": 1000 * c + n, "caption": f"caption {c} of {n}\n"}
        for c in range(captions)
        for n, id in enumerate(ids)
    ]
    return {"info": {"year": 2017}, "images": listed, "licenses": [], "annotations": said} | more


def test_coco_gives_each_image_all_its_captions(read, write, pictures):
    told = coco(5)
    records, skipped = read("coco", write("captions_val.json", told), pictures)
    assert not skipped and [bytes_of(record) for record in records] == [[encoded(number)] for number in range(5)]
    for number, record in enumerate(records):
        captions = [f"caption {c} of {number}" for c in range(5)]
        image = told["images"][number]["id"]
        assert record.fields == {
            "image": f"{number}.jpg",
            "image_id": image,
            "caption": captions[0],
            "captions": captions,
        }


def test_coco_does_not_depend_on_what_stands_first(read, write, pictures):
    told = coco(3)
    one, _ = read("coco", write("a.json", told), pictures)
    other, _ = read("coco", write("a.json", dict(reversed(told.items()))), pictures)
    assert one == other


def test_coco_skips_and_names_what_does_not_fit(read, write, pictures):
    told = coco(3)
    told["images"] += [{"id": 13, "file_name": "4.jpg"}, {"id": 77, "file_name": "3.jpg"}, {"file_name": "x.jpg"}]
    told["annotations"] += [
        {"image_id": 5555, "caption": "of nothing"},
        {"image_id": 13, "caption": "  "},
        {"caption": "of none"},
        "no object",
    ]
    records, skipped = read("coco", write("a.json", told), pictures)
    assert [len(record.fields["captions"]) for record in records] == [5, 5, 5]
    assert [one.reason.split("a.json ")[1] for one in skipped] == [
        "image 77: no caption; annotate it or leave it out",
        "image 4 of the list: id 13 comes twice; give every image its own",
        'image 6 of the list: no "id" or no "file_name"; give both',
        "annotation 16 of the list: no image has the id 5555; add it to the list of images",
        "annotation 17 of the list: no caption; fill it in",
        'annotation 18 of the list: no "image_id"; give the id of an image',
        'annotation 19 of the list: no "image_id"; give the id of an image',
    ]


COCO_FILES = {
    "no images": ({"annotations": []}, 'no "images"; give captions_*.json'),
    "a list": ([1], 'no "images"; give captions_*.json'),
    "a test set": (coco(2, 0), "pictures without annotations, as COCO has for its tests; give captions_*.json"),
    "boxes": (
        coco(1, annotations=[{"image_id": 13, "bbox": [1, 2, 3, 4]}]),
        "annotations hold image_id, bbox and no caption; give captions_*.json",
    ),
    "cut": (json.dumps(coco(9))[:-200], "not JSON, or cut short (parse error: premature EOF); download it again"),
    "not JSON": ("images:\n", "not JSON, or cut short (lexical error: invalid char in json text.); download it again"),
    "not UTF-8": (b'{"images": ["\xff"]}', "not JSON, or cut short (lexical error: invalid bytes in UTF8 string.)"),
    "a bomb of brackets": (b'{"images": ' + b"[" * 10**6, "more than 200 brackets within brackets; check where"),
    "a bomb that is closed": (b'{"images": ' + b"[" * 10**6 + b"]" * 10**6 + b"}", "more than 200 brackets"),
}  # fmt: skip


@pytest.mark.parametrize("fault", COCO_FILES)
def test_coco_file_that_can_not_be_used(fault, read, write, pictures):
    content, message = COCO_FILES[fault]
    with pytest.raises(UsageError) as refusal:
        read("coco", write("a.json", content), pictures)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_brackets_and_quotes_within_texts_are_no_depth(read, write, pictures):
    """Wherever the blocks that are read at once end."""
    told = coco(1, 1, annotations=[{"image_id": 13, "caption": '[{"\\' * 5000 + "x" * shift} for shift in range(4)])
    (record,), _ = read("coco", write("a.json", told), pictures)
    assert record.fields["captions"] == [said["caption"] for said in told["annotations"]]


# VQA


def vqa(images: int, each: int = 3, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The files of questions and of annotations, the latter in another order."""
    asked = [
        {"image_id": image, "question": f"Question {n} of {image}?", "question_id": 1000 * image + n}
        for image in range(images)
        for n in range(each)
    ]
    answered = [
        {
            "question_type": "what is",
            "multiple_choice_answer": "red",
            "answers": [{"answer": f"answer {n}", "answer_confidence": "yes", "answer_id": n + 1} for n in range(10)],
            "image_id": question["image_id"],
            "answer_type": "other",
            "question_id": question["question_id"],
        }
        for question in reversed(asked)
    ]
    head = {"info": {}, "data_type": "mscoco", "data_subtype": "val2014", "license": {}} | more
    return head | {"questions": asked}, head | {"annotations": answered}


VQA_NAMES = {
    "official": ("COCO_val2014_{:012d}.jpg", "val2014"),
    "in the folder of the split": ("val2014/COCO_val2014_{:012d}.jpg", "val2014"),
    "COCO 2017": ("{:012d}.jpg", "val2014"),
    "plain": ("{}.jpg", None),
}


@pytest.mark.parametrize("naming", VQA_NAMES)
def test_vqa_keeps_all_answers_and_finds_the_pictures(naming, read, write, tmp_path):
    pattern, part = VQA_NAMES[naming]
    for number in range(4):
        write(f"images/{pattern.format(number)}", encoded(number))
    questions, annotations = vqa(4, data_subtype=part)
    paths = {"annotations": write("a.json", annotations)}
    records, skipped = read("vqa", write("q.json", questions), tmp_path / "images", **paths)
    assert not skipped and [bytes_of(record) for record in records] == [[encoded(number)] for number in range(4)]
    for number, record in enumerate(records):
        assert record.fields["image_id"] == number and record.fields["image"] == pattern.format(number)
        assert record.fields["qa"] == [
            {
                "question": f"Question {n} of {number}?",
                "answers": [f"answer {a}" for a in range(10)],
                "question_id": 1000 * number + n,
                "type": "other",
                "question_type": "what is",
            }
            for n in range(3)
        ]


def test_vqa_images_keep_the_order_of_their_first_question(read, write, pictures):
    questions, annotations = vqa(3)
    questions["questions"].sort(key=lambda question: (question["question_id"] % 1000, -question["image_id"]))
    paths = {"annotations": write("a.json", annotations)}
    records, _ = read("vqa", write("q.json", questions), pictures, **paths)
    assert [record.fields["image_id"] for record in records] == [2, 1, 0]
    assert [entry["question_id"] for entry in records[0].fields["qa"]] == [2000, 2001, 2002]


def test_vqa_skips_and_names_what_does_not_fit(read, write, pictures):
    questions, annotations = vqa(3)
    answered = {entry["question_id"]: entry for entry in annotations["annotations"]}
    answered.pop(1)
    answered[1001]["image_id"] = 2
    answered[2000]["answers"][3]["answer"] = ""
    answered[2001]["answers"] = []
    answered[9000] = {"question_id": 9000, "image_id": 0, "answers": []}
    annotations["annotations"] = [*answered.values(), answered[0], {"answers": []}]
    questions["questions"] += [{"image_id": 7, "question": "Where?", "question_id": 7000}, questions["questions"][0]]
    answered[7000] = answered[0] | {"question_id": 7000, "image_id": 7}
    annotations["annotations"].append(answered[7000])
    paths = {"annotations": write("a.json", annotations)}
    records, skipped = read("vqa", write("q.json", questions), pictures, **paths)
    asked = [[entry["question_id"] for entry in record.fields["qa"]] for record in records]
    assert asked == [[0, 2], [1000, 1002], [2002]]
    reasons = [one.reason.replace(f"{pictures.parent}/", "") for one in skipped]
    assert reasons == [
        "q.json question 1: no answers in a.json; give the annotations that belong",
        "q.json question 1001: asked about image 1, answered about 2; give the annotations that belong",
        "a.json question 2000: 9 answers of 10 have a text; fill in the others",
        "a.json question 2001: 0 answers of 0 have a text; fill in the others",
        "q.json image 7: none of COCO_val2014_000000000007.jpg, val2014/COCO_val2014_000000000007.jpg, 000000000007.jpg, "
        "7.jpg in pictures; give their folder by --images",
        "a.json question 9000: not in q.json; give the questions that belong",
        "q.json 11 of questions: question_id 0 comes twice; give every question its own",
        "a.json 10 of annotations: question_id 0 comes twice; give every question its own",
        'a.json 11 of annotations: no "question_id" or no "image_id"; give both',
    ]


def test_vqa_files_that_can_not_be_used(read, write, pictures):
    questions, annotations = (write(name, told) for name, told in zip(("q.json", "a.json"), vqa(2), strict=True))
    for arguments, message in (
        ({}, "q.json: questions without answers; give --annotations v2_…_annotations.json"),
        ({"annotations": pictures / "no.json"}, "no.json: no such file; check the path"),
        ({"annotations": questions}, 'q.json: no "annotations" in it; give v2_…_annotations.json'),
        ({"src": annotations, "annotations": annotations}, 'a.json: no "questions" in it; give v2_…_questions.json'),
    ):
        with pytest.raises(UsageError) as refusal:
            read("vqa", **{"src": questions, "images": pictures} | arguments)
        assert message in str(refusal.value)


def test_vqa_annotations_that_have_changed_are_another_source(write, pictures):
    questions, told = vqa(2)
    src, path = write("q.json", questions), write("a.json", told)
    one = vars(open_source("vqa", src, pictures, annotations=path))
    write("a.json", told | {"more": 1})
    assert vars(open_source("vqa", src, pictures, annotations=path)) != one


# LLaVA


def turns(*said: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(said)]


LLAVA = [
    {"id": "a", "image": "0.jpg", "conversations": turns("<image>\nWhat?", "A kite.", "Where?", "There.")},
    {"id": "b", "image": "1.jpg", "conversations": turns("What?\n<image>", "Tags like <image> are text.")},
    {
        "id": "c",
        "image": ["2.jpg", "0.jpg"],
        "conversations": turns("First: <image>\n\nthen\n<image>\nWhich?", "Both."),
    },
    {"id": "d", "conversations": [{"from": "system", "value": "Be brief."}, *turns("Hello", "Hi")]},
]


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("start", ["", "\ufeff \n"])
def test_llava_conversations_become_messages(lines, start, read, write, pictures):
    content = "\n".join(map(json.dumps, LLAVA)) if lines else json.dumps(LLAVA, indent=1)
    records, skipped = read("llava", write("a.json", start.strip("\n " if lines else "") + content), pictures)
    image, text = {"type": "image"}, lambda said: {"type": "text", "text": said}
    assert not skipped
    assert [[message["content"] for message in record.fields["messages"]] for record in records] == [
        [[image, text("What?")], [text("A kite.")], [text("Where?")], [text("There.")]],
        [[text("What?"), image], [text("Tags like <image> are text.")]],
        [[text("First: "), image, text("\nthen"), image, text("Which?")], [text("Both.")]],
        [[text("Be brief.")], [text("Hello")], [text("Hi")]],
    ]
    assert [message["role"] for message in records[3].fields["messages"]] == ["system", "user", "assistant"]
    assert [bytes_of(record) for record in records] == [[encoded(0)], [encoded(1)], [encoded(2), encoded(0)], []]
    assert [record.fields["id"] for record in records] == ["a", "b", "c", "d"]
    for record in records:
        parts = {f"{number}.jpg": data for number, data in enumerate(bytes_of(record))}
        parse_sample("k", parts | {"json": json.dumps(record.fields).encode()})


LLAVA_FAULTS = {
    "no conversations": ({"image": "0.jpg"}, 'no list of "conversations"'),
    "no object": ([], 'no list of "conversations"'),
    "fewer images": (
        {"image": "0.jpg", "conversations": turns("<image><image>", "a")},
        "1 images and 2 <image>; give as many of one as of the other",
    ),
    "fewer places": ({"image": ["0.jpg", "1.jpg"], "conversations": turns("<image>", "a")}, "2 images and 1 <image>"),
    "in the answer": ({"image": "0.jpg", "conversations": turns("What?", "<image>")}, "1 images and 0 <image>"),
    "unknown speaker": ({"conversations": [{"from": "cat", "value": "m"}]}, "a turn from 'cat'; write"),
    "no turn": ({"conversations": ["hello"]}, "a turn from None; write"),
    "says nothing": ({"conversations": turns("Hello", "  ")}, "a turn from 'gpt' says nothing; fill it in or drop it"),
    "no answer": ({"conversations": turns("Hello")}, "1 turns and no answer; give one from 'gpt'"),
    "empty": ({"conversations": []}, "0 turns and no answer"),
    "a video": ({"video": "a.mp4", "conversations": turns("<video>", "a")}, "a video; take pictures from it"),
    "an address": ({"image": "https://x/0.jpg", "conversations": turns("<image>", "a")}, "an address; download them"),
    "path": ({"image": 7, "conversations": turns("<image>", "a")}, "image paths are not strings"),
}  # fmt: skip


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("fault", LLAVA_FAULTS)
def test_llava_entry_that_can_not_be_used(fault, lines, read, write, pictures):
    entry, message = LLAVA_FAULTS[fault]
    if lines and isinstance(entry, list):
        entry = 7  # a file of JSON lines does not start with a list
    entries = [LLAVA[0], entry, LLAVA[3]]
    content = "\n".join(map(json.dumps, entries)) if lines else json.dumps(entries)
    records, skipped = read("llava", write("a.json", content), pictures)
    assert [record.fields["id"] for record in records] == ["a", "d"]
    assert says(skipped, f"{pictures.parent}/a.json entry 2: ", message)


def test_llava_file_that_is_cut_is_no_shorter_one(read, write, pictures):
    content = json.dumps(LLAVA)
    for end in range(1, len(content) - 1, 7):
        with pytest.raises(UsageError, match="cut short"):
            read("llava", write("a.json", content[:end]), pictures)
    lines = "\n".join(map(json.dumps, LLAVA))
    records, skipped = read("llava", write("a.json", lines[:-5]), pictures)
    assert len(records) == 3 and says(skipped, "entry 4: not JSON (", "write one list of objects, or one object a line")


# Folders


@pytest.fixture
def classes(write, tmp_path) -> Path:
    """Two classes, and much that is no picture."""
    for number, name in enumerate(["golden_retriever/b.JPEG", "golden_retriever/a.jpg", "cat/c.png", "cat/a.b.webp"]):
        kind = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}[name.rpartition(".")[2].lower()]
        write(f"classes/{name}", encoded(number, kind))
    for name in ("readme.txt", "cat/.DS_Store", "cat/notes.txt", "cat/deeper/d.jpg", "empty/none.md"):
        write(f"classes/{name}", b"")
    return tmp_path / "classes"


def test_folder_of_classes(read, classes):
    records, skipped = read("folder", classes)
    assert [(record.fields["image"], record.fields["label"], record.fields["caption"]) for record in records] == [
        ("cat/a.b.webp", "cat", "a photo of a cat"),
        ("cat/c.png", "cat", "a photo of a cat"),
        ("golden_retriever/a.jpg", "golden retriever", "a photo of a golden retriever"),
        ("golden_retriever/b.JPEG", "golden retriever", "a photo of a golden retriever"),
    ]
    assert [bytes_of(record)[0][:3] for record in records] == [b"RIF", b"\x89PN", b"\xff\xd8\xff", b"\xff\xd8\xff"]
    assert skipped == [Skipped(f"{classes}: 5 files and folders that are not pictures of a class", 0)]


def test_folder_template_links_and_odd_names(read, classes, pictures, tmp_path):
    os.rename(classes / "cat", classes / "{0.__class__}")
    (classes / "linked").symlink_to(pictures)
    (classes / "golden_retriever" / "c.jpg").symlink_to(pictures / "3.jpg")
    records, _ = read("folder", classes, template="the {}, seen")
    assert Path(records[2].images[0]).read_bytes() == encoded(3) and len(records) == 10
    assert {record.fields["caption"] for record in records} == {
        "the golden retriever, seen",
        "the linked, seen",
        "the {0.  class  }, seen",
    }


def test_folder_pictures_that_can_not_be_read_are_named(classes, write, tmp_path):
    write("classes/cat/d.gif", b"GIF89a")
    (classes / "cat" / "e.jpg").symlink_to("nowhere")
    assert convert(classes, tmp_path / "out", "folder", max_skipped=0.5).samples == 4
    text = (tmp_path / "out" / "skipped.jsonl").read_text()
    assert "d.gif: not a JPEG, PNG or WebP file" in text and "e.jpg: No such file" in text


def test_folder_that_can_not_be_used(read, classes, pictures):
    none = classes / "cat" / "deeper"
    for arguments, message in (
        (
            {"src": pictures},
            "pictures: no pictures in folders of it; put the pictures of each class into a folder named",
        ),
        ({"src": none}, "no pictures in folders of it"),
        ({"src": classes / "readme.txt"}, "readme.txt: no such folder; check the path"),
        ({"template": "a photo"}, "--template: 'a photo' has 0 places for the class; give it one {}"),
        ({"template": "{} {}"}, "--template: '{} {}' has 2 places for the class"),
        ({"images": pictures}, "--images: the pictures of this format lie in"),
    ):
        with pytest.raises(UsageError) as refusal:
            read("folder", **{"src": classes} | arguments)
        assert message in str(refusal.value)


# What img2dataset leaves


def crawl(
    folder: Path, shard: int, count: int = 5, failed: int = 2, *, tells: bool = True, caption: bool = True
) -> Path:
    """A shard as img2dataset writes it, with its own library: .jpg, .json, .txt; parquet and stats of all addresses."""
    folder.mkdir(exist_ok=True)
    lines = []
    with webdataset.TarWriter(str(folder / f"{shard:05d}.tar"), mtime=0) as tar:
        for number in range(count + failed):
            key, good = f"{shard:05d}{number:04d}", number < count
            meta = {"url": f"http://x/{number}", "caption": f"caption {number} of {shard}", "key": key}
            meta |= {"status": "success" if good else "failed_to_download", "width": 8, "exif": "{}"}
            lines.append(dict(meta))
            if not caption:
                del meta["caption"]
            if good:
                text = {"txt": lines[-1]["caption"]} if caption else {}
                image = encoded(100 * shard + number)
                tar.write({"__key__": key, "jpg": image, "json": json.dumps(meta, indent=4)} | text)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), folder / f"{shard:05d}.parquet")
    if tells:
        told = {"count": count + failed, "successes": count, "failed_to_download": failed, "failed_to_resize": 0}
        told["status_dict"] = {"success": count, "HTTP Error 404: Not Found": failed}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(told))
    return folder / f"{shard:05d}.tar"


def as_files(tar: Path) -> None:
    """The shard in the other layout, a folder of files."""
    with tarfile.open(tar) as opened:
        opened.extractall(tar.with_suffix(""), filter="data")
    tar.unlink()


@pytest.mark.parametrize("files", [False, True])
@pytest.mark.parametrize("tells", [False, True])
@pytest.mark.parametrize("caption", [False, True])
def test_img2dataset_output(files, tells, caption, read, tmp_path):
    """In both layouts; with a caption beside the picture or in the parquet file alone; with the parquet file alone."""
    for shard in range(3):
        tar = crawl(tmp_path / "crawl", shard, tells=tells, caption=caption)
        as_files(tar) if files else None
    records, skipped = read("img2dataset", tmp_path / "crawl")
    assert [record.fields["caption"] for record in records] == [
        f"caption {n} of {s}" for s in range(3) for n in range(5)
    ]
    assert [bytes_of(record) for record in records] == [[encoded(100 * s + n)] for s in range(3) for n in range(5)]
    assert records[7].fields["url"] == "http://x/2" and records[7].fields["key"] == "000010002"
    assert records[7].key == "00001-000010002"
    reason = "HTTP Error 404: Not Found" if tells else "failed_to_download"
    assert [one.reason.partition("crawl/")[2].replace(".tar", "") for one in skipped] == [
        f"0000{shard}: 2 of 7 addresses were not downloaded; {reason}: 2" for shard in range(3)
    ]
    assert all(one.samples == 0 for one in skipped)


def test_img2dataset_keys_may_come_again_in_another_shard(read, tmp_path):
    for shard in range(2):
        crawl(tmp_path / "crawl", 0).rename(tmp_path / "crawl" / f"{shard}-part.tar")
    assert [record.key for record in read("img2dataset", tmp_path / "crawl")[0]] == [
        f"0000{shard}-00000000{number}" for shard in range(2) for number in range(5)
    ]


@pytest.mark.parametrize("tells", ["stats", "parquet", "nothing"])
def test_a_tar_cut_anywhere_gives_whole_pairs_and_names_the_loss(tells, read, tmp_path):
    tar = crawl(tmp_path / "crawl", 0, tells=tells == "stats")
    crawl(tmp_path / "crawl", 1, 2, 0)
    if tells == "nothing":
        (tmp_path / "crawl" / "00000.parquet").unlink()
    whole = tar.read_bytes()
    with tarfile.open(tar) as opened:
        ends = [m.offset_data + -(-m.size // 512) * 512 for m in opened if m.name.endswith(".txt")]
    for length in range(0, len(whole), 512):
        tar.write_bytes(whole[:length])
        records, skipped = read("img2dataset", tmp_path / "crawl")
        complete = sum(end <= length for end in ends)
        pairs = [(record.fields["caption"], bytes_of(record)) for record in records]
        expected = [(f"caption {n} of 0", [encoded(n)]) for n in range(complete)]
        assert pairs == expected + [(f"caption {n} of 1", [encoded(100 + n)]) for n in range(2)]
        if length < ends[-1] + 512:
            loss = skipped[0]
            assert loss.samples == (5 - complete if tells != "nothing" else 1)
            last = f"00000000{complete - 1}" if complete else "no sample"
            lost = (
                f"{5 - complete} samples are lost" if tells != "nothing" else "how many samples are lost is not known"
            )
            assert loss.reason == f"{tar}: truncated at {length} bytes, after {last}; {lost}; download it again"
        else:
            assert sum(one.samples for one in skipped) == 0


def test_a_tar_cut_within_a_block_too(read, tmp_path):
    tar = crawl(tmp_path / "crawl", 0, 2)
    whole = tar.read_bytes()
    for length in range(1, 6000, 37):
        tar.write_bytes(whole[:length])
        for record in read("img2dataset", tmp_path / "crawl")[0]:
            number = int(record.fields["key"])
            assert (record.fields["caption"], bytes_of(record)) == (f"caption {number} of 0", [encoded(number)])


def test_a_damaged_header_ends_the_tar_and_is_named(read, tmp_path):
    tar = crawl(tmp_path / "crawl", 0)
    with tarfile.open(tar) as opened:
        place = opened.getmember("000000002.jpg").offset
    data = bytearray(tar.read_bytes())
    data[place + 3] ^= 1
    tar.write_bytes(data)
    records, skipped = read("img2dataset", tmp_path / "crawl")
    assert [record.fields["key"] for record in records] == ["000000000", "000000001"]
    assert skipped[0].samples == 3
    assert f"00000.tar: not an uncompressed tar (invalid header at byte {place})" in skipped[0].reason
    assert skipped[0].reason.endswith(", after 000000001; 3 samples are lost; download it again")


def test_a_header_damaged_in_any_byte_mispairs_nothing(read, tmp_path):
    tar = crawl(tmp_path / "crawl", 0, 3)
    with tarfile.open(tar) as opened:
        member = opened.getmember("000000001.jpg")
    whole = tar.read_bytes()
    for place in range(member.offset, member.offset_data):
        for mask in (0x01, 0x08, 0xFF):
            tar.write_bytes(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
            records, skipped = read("img2dataset", tmp_path / "crawl")
            pairs = {(record.fields["caption"], *bytes_of(record)) for record in records}
            assert pairs <= {(f"caption {number} of 0", encoded(number)) for number in range(3)}
            assert len(records) + sum(one.samples for one in skipped) == 3


def test_the_last_pair_before_a_cut_is_used_only_if_nothing_can_be_missing(read, tmp_path):
    """A picture and its JSON: the .txt may have been cut off."""
    tar = crawl(tmp_path / "crawl", 0)
    with tarfile.open(tar) as opened:
        text = opened.getmember("000000004.txt")
    tar.write_bytes(tar.read_bytes()[: text.offset])
    records, skipped = read("img2dataset", tmp_path / "crawl")
    assert len(records) == 4 and skipped[0].samples == 1


def test_a_whole_tar_that_lacks_samples_is_named(read, tmp_path):
    crawl(tmp_path / "crawl", 0, 7)
    (tmp_path / "crawl" / "00000.tar").rename(tmp_path / "seven")
    crawl(tmp_path / "crawl", 0, 5)
    stats = tmp_path / "crawl" / "00000_stats.json"
    stats.write_text(stats.read_text().replace('"successes": 5', '"successes": 7'))
    records, skipped = read("img2dataset", tmp_path / "crawl")
    assert len(records) == 5 and skipped[0].samples == 2
    assert skipped[0].reason.endswith("00000.tar: 5 samples, 00000_stats.json tells of 7; download it again")


def tar_of(path: Path, members: list[tuple[str, bytes | str]]) -> Path:
    """A tar of these, bytes as files, `> name` as symbolic and `= name` as hard links, other words as other things."""
    kinds = {"folder": tarfile.DIRTYPE, "pipe": tarfile.FIFOTYPE, "device": tarfile.CHRTYPE}
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
            elif content in kinds:
                member.type = kinds[content]
            else:
                member.type = tarfile.SYMTYPE if content.startswith(">") else tarfile.LNKTYPE
                member.linkname = content[2:]
            tar.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def pair(key: str, number: int = 0, caption: str = "c") -> list[tuple[str, bytes | str]]:
    return [(f"{key}.jpg", encoded(number)), (f"{key}.txt", caption.encode())]


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("executed",)


HOSTILE: dict[str, tuple[list[tuple[str, bytes | str]], list[str]]] = {
    "above": (pair("../x"), ["'../x' is no name for a member"]),
    "above, within": (pair("a/../../x"), ["'a/../../x' is no name for a member"]),
    "absolute": (pair("/etc/x"), ["'/etc/x' is no name for a member"]),
    "two lines": (pair("a\nb"), ["'a\\nb' is no name for a member"]),
    "not UTF-8": (pair("a\udcff"), ["'a\\udcff' is no name for a member"]),
    "no name": (pair("a/"), ["'a/' is no name for a member"]),
    "dots": (pair("img.v1", 1) + pair("img.v2", 2), ["key 'img.v1' has dots", "key 'img.v2' has dots"]),
    "numbers": ([("i.0.jpg", encoded(0)), ("i.1.jpg", encoded(1))], ["key 'i.0' has dots", "key 'i.1' has dots"]),
    "dots of a folder": (pair("a.b/x"), ["key 'a.b/x' has dots"]),
    "a key again": (pair("x", 1, "one") + pair("y") + pair("x", 2, "two"), ["key 'x' comes twice"]),
    "a part again": (pair("x", 1, "one") + pair("x", 2, "two"), ["x.jpg comes 2 times"]),
    "a part again, larger": ([*pair("x"), ("x.JPG", encoded(2))], ["x.jpg comes 2 times"]),
    "two pictures": ([*pair("x"), ("x.png", encoded(2, "PNG"))], ["x: 2 pictures among its parts jpg, txt, png"]),
    "a link": ([("x.jpg", "> /etc/passwd"), ("x.txt", b"c")], ["x: 0 pictures among its parts txt"]),
    "a hard link": ([("x.jpg", "= good.jpg"), ("x.txt", b"c")], ["x: 0 pictures among its parts txt"]),
    "a pipe": ([("x.jpg", "pipe"), ("x.txt", b"c")], ["x: 0 pictures among its parts txt"]),
    "a device": ([("x.jpg", "device"), ("x.txt", b"c")], ["x: 0 pictures among its parts txt"]),
    "a folder": ([("x.jpg", "folder"), ("x.txt", b"c")], ["x: 0 pictures among its parts txt"]),
    "programs": (
        [("x.pickle", pickle.dumps(Bomb())), ("y.pth", pickle.dumps(Bomb())), ("z", b"")],
        ["3 members that are no picture, .txt or .json, the first 'x.pickle'"],
    ),
    "no caption": ([("x.jpg", encoded(0))], ["x: a picture without caption, question or text; fill one in"]),
    "empty caption": (pair("x", 0, " \n"), ["x: a picture without caption, question or text; fill one in"]),
    "no JSON": ([*pair("x"), ("x.json", b"{")], ["x: .json can not be read ("]),
    "JSON of a list": ([*pair("x"), ("x.json", b"[]")], ["x: .json holds a list; write one JSON object"]),
    "a bomb of brackets": ([*pair("x"), ("x.json", b"[" * 10**5)], ["x: .json can not be read ("]),
    "caption not UTF-8": ([("x.jpg", encoded(0)), ("x.txt", b"\xff")], ["x: .txt is not UTF-8 at byte 0"]),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_member_is_named_and_does_nothing(kind, read, tmp_path, monkeypatch):
    members, reasons = HOSTILE[kind]
    path = tar_of(tmp_path / "crawl" / "00000.tar", [*pair("good", 3, "before"), *members, *pair("last", 4, "after")])
    monkeypatch.chdir(tmp_path / "crawl")
    before = sorted(tmp_path.rglob("*"))
    records, skipped = read("img2dataset", tmp_path / "crawl")
    assert [record for record in sorted(tmp_path.rglob("*")) if "scratch" not in str(record)] == before
    found = {record.fields["key"]: (record.fields["caption"], bytes_of(record)) for record in records}
    assert found.pop("good") == ("before", [encoded(3)]) and found.pop("last") == ("after", [encoded(4)])
    again = {"x": ("one", [encoded(1)]), "y": ("c", [encoded(0)])}
    assert found == (again if kind == "a key again" else {})
    assert len(skipped) == len(reasons)
    for one, reason in zip(skipped, reasons, strict=True):
        assert one.reason.startswith(str(path)) and reason in one.reason
        assert one.samples == (0 if kind == "programs" else 1)


def test_a_file_with_holes_does_not_swallow_what_follows(read, tmp_path):
    """A sparse member says a size that is not that of what is stored; here, of the next pair too."""
    folder = tmp_path / "crawl"
    inner = tar_of(folder / "inner", pair("y", 2, "of y")).read_bytes()[:-1024].rstrip(b"\0")
    inner += bytes(-len(inner) % 512)
    image = encoded(1) + bytes(-len(encoded(1)) % 512)
    header = tarfile.TarInfo("x.jpg")
    header.size, header.type = len(image), tarfile.GNUTYPE_SPARSE
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[386:410] = b"%011o\0%011o\0" % (0, len(image))
    block[483:495] = b"%011o\0" % (len(image) + len(inner))
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    first, last = (tar_of(folder / "inner", pair(key, 3)).read_bytes() for key in ("a", "z"))
    first = first[: first.rindex(b"c") + 512 - first.rindex(b"c") % 512]
    (folder / "00000.tar").write_bytes(first + bytes(block) + image + inner + last)
    records, skipped = read("img2dataset", folder)
    assert [bytes_of(record) for record in records] == [[encoded(3)]] * len(records)
    assert skipped[0].samples == 1 and f"at byte {len(first)}" in skipped[0].reason


def test_links_and_pipes_in_a_shard_of_files_are_not_followed(read, write, tmp_path, pictures):
    shard = tmp_path / "crawl" / "00000"
    shard.mkdir(parents=True)
    for name, data in [*pair("00000/a", 1), *pair("00000/b", 2)]:
        write(f"crawl/{name}", data)
    (shard / "c.jpg").symlink_to(pictures / "0.jpg")
    (shard / "c.txt").write_text("linked")
    os.mkfifo(shard / "d.jpg")
    records, skipped = read("img2dataset", tmp_path / "crawl")
    assert [record.fields["key"] for record in records] == ["a", "b"]
    assert says(skipped, "00000 c: 0 pictures among its parts txt; give it one")


def test_scattered_parts_are_never_put_together(read, tmp_path):
    members = [pair("a", 1, "one"), pair("b", 2, "two"), pair("c", 3, "three")]
    tar_of(tmp_path / "crawl" / "00000.tar", list(itertools.chain(*zip(*members, strict=True))))
    records, skipped = read("img2dataset", tmp_path / "crawl")
    assert not records and sum("comes twice" in one.reason for one in skipped) == 3


def test_a_part_larger_than_any_picture_is_not_read(read, tmp_path, monkeypatch):
    monkeypatch.setattr("vlm.data_tools.sources.img2dataset._LARGEST", 20)
    tar_of(tmp_path / "crawl" / "00000.tar", pair("x"))
    _, skipped = read("img2dataset", tmp_path / "crawl")
    assert says(skipped, "00000.tar x: .jpg has ", "bytes, the limit is 20; drop it")


def test_captions_in_a_parquet_file_need_pyarrow(read, tmp_path, monkeypatch):
    """And nothing else does."""
    crawl(tmp_path / "crawl", 0, 1)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert len(read("img2dataset", tmp_path / "crawl")[0]) == 1
    crawl_without = tmp_path / "without"
    monkeypatch.undo()
    crawl(crawl_without, 0, 1, 0, caption=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    records, skipped = read("img2dataset", crawl_without)
    assert not records and says(skipped, "00000.parquet: pyarrow is needed to read it; pip install 'vlm[parquet]'")


def test_a_damaged_parquet_file_is_named_where_it_is_needed(read, tmp_path):
    crawl(tmp_path / "crawl", 0, 1, 0, caption=False)
    (tmp_path / "crawl" / "00000.parquet").write_bytes(b"PAR1")
    _, skipped = read("img2dataset", tmp_path / "crawl")
    assert says(skipped, "00000.parquet: can not be read (", "; download it again")


@pytest.mark.parametrize("stats", ["", "[]", "{}", '{"count": "x", "successes": 1}', "[" * 100_000])
def test_stats_that_say_nothing_leave_the_parquet_file(stats, read, tmp_path):
    crawl(tmp_path / "crawl", 0)
    (tmp_path / "crawl" / "00000_stats.json").write_text(stats)
    _, skipped = read("img2dataset", tmp_path / "crawl")
    assert says(skipped, "2 of 7 addresses were not downloaded; failed_to_download: 2")


def test_img2dataset_output_that_can_not_be_used(read, write, tmp_path, pictures):
    tar = crawl(tmp_path / "crawl", 0)
    for src, arguments, message in (
        (pictures, {}, "pictures: no .tar and no folder of pictures 00000; give the output folder of img2dataset"),
        (tar, {}, "00000.tar: no such folder; check the path"),
        (
            Path("pipe:curl http://x/00000.tar"),
            {},
            "a command or an address, which is neither run nor fetched; download",
        ),
        (Path("https://x/crawl"), {}, "a command or an address, which is neither run nor fetched"),
        (tmp_path / "crawl", {"images": pictures}, "--images: the pictures of this format lie in"),
    ):
        with pytest.raises(UsageError) as refusal:
            read("img2dataset", src, **arguments)
        assert message in str(refusal.value) and "\n" not in str(refusal.value)


# All of them


def sized(format: str, folder: Path, count: int, *, pictures: bool = False) -> dict[str, Any]:
    """What `open_source` takes for so many samples of a format; with `pictures`, they are there."""
    folder.mkdir()
    images = folder / "images"
    images.mkdir()
    if pictures and format != "img2dataset":
        for number in range(count):
            (images / f"{number}.jpg").write_bytes(encoded(number))
    src, options = folder / "source", {"images": images}
    if format == "jsonl":
        lines = ({"image": f"{n}.jpg", "caption": f"caption {n}"} for n in range(count))
        src.write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif format == "csv":
        src.write_text("image,caption\n" + "".join(f'{n}.jpg,"caption {n}"\n' for n in range(count)))
    elif format == "coco":
        src.write_text(json.dumps(coco(count, 2)))
    elif format == "vqa":
        questions, annotations = vqa(count, 2)
        src.write_text(json.dumps(questions))
        options["annotations"] = folder / "annotations"
        options["annotations"].write_text(json.dumps(annotations))
    elif format == "llava":
        src.write_text(
            json.dumps([{"image": f"{n}.jpg", "conversations": turns("<image>", f"a {n}")} for n in range(count)])
        )
    elif format == "folder":
        src, options = folder, {}
        if not pictures:
            for number in range(count):
                (images / f"{number}.jpg").touch()
    else:
        src, options = folder, {}
        images.rmdir()
        for start in range(0, count, 50):
            members = [pair(f"{n:09d}", n, f"caption {n}") for n in range(start, start + 50)]
            tar_of(folder / f"{start // 50:05d}.tar", list(itertools.chain(*members)))
    return {"src": src, **options}


@pytest.mark.parametrize("format", [name for name in SOURCES if name != "img2dataset"])
def test_rows_do_not_hold_the_set(format, tmp_path):
    """Ten times as many samples take the same memory. What SQLite takes beside is bounded by its own setting."""
    peaks = {}
    for count in (500, 5000):
        source = open_source(format, **sized(format, tmp_path / str(count), count))
        tracemalloc.start()
        rows = sum(1 for row in source.rows(tmp_path / "scratch") if not isinstance(row, Skipped))
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert rows == count and source.count() == count
    # 5 000 rows that are held would be half a megabyte and more; what else this process does meanwhile is counted too.
    assert peaks[5000] < 1.2 * peaks[500] + 100_000, peaks


def test_tables_keep_a_bounded_part_in_memory(tmp_path):
    from vlm.data_tools.sources.tables import Tables

    with Tables(tmp_path, "") as tables:
        (kibibytes,) = tables.execute("PRAGMA cache_size").fetchone()
        assert -65536 <= kibibytes < 0


def test_a_disk_that_runs_full_under_the_tables_says_so(tmp_path):
    from vlm.data_tools.sources.tables import Tables

    with Tables(tmp_path, "CREATE TABLE a (b);") as tables:
        tables.execute("PRAGMA max_page_count = 20")
        with pytest.raises(OSError, match="No space left on device"):
            for _ in range(100):
                tables.execute("INSERT INTO a VALUES (?)", ("x" * 4000,))


@pytest.mark.parametrize("format", SOURCES)
def test_one_corrupt_picture_in_a_hundred_is_skipped_and_counted(format, tmp_path):
    """Converted on one process and on two, to the same bytes."""
    arguments = sized(format, tmp_path / "in", 200, pictures=True)
    bad = {37, 190}
    damage(format, arguments, bad)
    written = []
    for processes in (1, 2):
        out = tmp_path / f"out{processes}"
        counts = convert(out=out, format=format, samples_per_shard=60, engine=LocalEngine(processes), **arguments)
        assert counts == Converted(samples=198, skipped=2)
        written.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert written[0] == written[1] and "skipped.jsonl" in written[0]
    samples = list(Shards.open(tmp_path / "out1"))
    images = {sample.images[0] for sample in samples}
    assert images == {encoded(number) for number in range(200) if number not in bad}


@pytest.mark.parametrize("format", SOURCES)
def test_where_all_pictures_are_corrupt_it_stops(format, tmp_path):
    arguments = sized(format, tmp_path / "in", 50, pictures=True)
    damage(format, arguments, set(range(50)))
    with pytest.raises(UsageError, match="50 of 50 samples can not be used, and 10% may; mend them or raise"):
        convert(out=tmp_path / "out", format=format, **arguments)
    assert not (tmp_path / "out").exists()


def damage(format: str, arguments: dict[str, Any], numbers: set[int]) -> None:
    """Cut these pictures in half."""
    for number in numbers:
        if format == "img2dataset":
            path = arguments["src"] / f"{number // 50:05d}.tar"
            data, good = path.read_bytes(), encoded(number)
            path.write_bytes(data.replace(good, good[: len(good) // 2] + bytes(len(good) - len(good) // 2)))
        else:
            folder = arguments["src"] if format == "folder" else arguments["images"].parent
            path = folder / "images" / f"{number}.jpg"
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_what_is_skipped_of_a_shard_is_counted(tmp_path):
    """The samples that a cut tar has lost are, and addresses that were never downloaded are told and are not."""
    tar = crawl(tmp_path / "crawl", 0, 30)
    tar.write_bytes(tar.read_bytes()[: -100 * 512])
    counts = convert(tmp_path / "crawl", tmp_path / "out", "img2dataset", max_skipped=0.9)
    assert counts.samples + counts.skipped == 30 and counts.skipped > 5
    assert len(Shards.open(tmp_path / "out")) == counts.samples
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert f"{counts.skipped} samples are lost" in reasons[0] and "2 of 32 addresses were not downloaded" in reasons[1]


def test_what_a_source_skips_without_work_is_counted(tmp_path, write, pictures):
    told = coco(3)
    told["images"].append({"id": 77, "file_name": "3.jpg"})
    counts = convert(write("a.json", told), tmp_path / "out", "coco", pictures, max_skipped=0.5)
    assert counts == Converted(samples=3, skipped=1)


@pytest.mark.parametrize("format", SOURCES)
def test_an_option_of_another_format_is_named(format, tmp_path):
    arguments = sized(format, tmp_path / "in", 50)
    given = {"columns": {}, "annotations": Path("a"), "template": "{}"}
    for name in set(given) - set(SOURCES[format].options):
        with pytest.raises(UsageError) as refusal:
            open_source(format, **arguments | {name: given[name]})
        flag = {"columns": "--column"}.get(name, f"--{name}")
        assert str(refusal.value).startswith(f"{flag}: not for {format}, which takes ")
        assert str(refusal.value).endswith("; leave it out")


def test_a_format_that_is_not_known_is_named(tmp_path):
    with pytest.raises(
        UsageError, match="format 'parquet' is not known; use one of jsonl, coco, vqa, llava, csv, folder"
    ):
        open_source("parquet", tmp_path, None)


@pytest.mark.parametrize("format", SOURCES)
def test_a_source_that_can_not_be_read_is_named(format, tmp_path, monkeypatch):
    arguments = sized(format, tmp_path / "in", 50)

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    source = open_source(format, **arguments)
    for place in ("base.open", "jsonl.open", "folder.os.scandir", "img2dataset.os.scandir"):
        monkeypatch.setattr(f"vlm.data_tools.sources.{place}", denied, raising=False)
    with pytest.raises(UsageError, match="can not be read .Permission denied.; check its permissions"):
        list(source.rows(tmp_path / "scratch"))
