"""Folders of classes of `vlm data convert`: what comes out, and every fault."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from source_files import bytes_of, encoded

from vlm.data_tools.convert import convert
from vlm.data_tools.sources import Skipped
from vlm.errors import UsageError


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
