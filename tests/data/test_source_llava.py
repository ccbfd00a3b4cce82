"""LLaVA conversations of `vlm data convert`: what comes out, and every fault."""

from __future__ import annotations

import json

import pytest
from source_files import bytes_of, encoded, says, turns

from vlm.errors import UsageError
from vlm.samples import parse_sample

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
