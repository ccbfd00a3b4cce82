"""Tables of `vlm data convert`, CSV and TSV: what comes out, and every fault."""

from __future__ import annotations

import csv
import io
import json

import pytest
from source_files import bytes_of, encoded, says

from vlm.errors import UsageError
from vlm.samples import parse_sample

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
