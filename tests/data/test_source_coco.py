"""COCO captions of `vlm data convert`: what comes out, and every fault."""

from __future__ import annotations

import json

import pytest
from source_files import bytes_of, coco, encoded

from vlm.errors import UsageError


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
