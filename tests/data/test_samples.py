"""What `vlm.samples` reads from the parts of a sample, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vlm.errors import UsageError
from vlm.samples import Question, SampleError, conversations, is_image_part, pair_text, pair_texts, parse_sample


def parts(**fields: Any) -> dict[str, bytes]:
    return {"json": json.dumps(fields).encode()}


def test_images_stand_in_the_order_of_their_numbers() -> None:
    files = {f"{number}.jpg": bytes([number]) for number in (10, 2, 0, 1)}
    assert parse_sample("k", files).images == (b"\0", b"\1", b"\2", b"\x0a")


@pytest.mark.parametrize("extension", ["jpg", "JPEG", "png", "webp", "0.png", "12.webp"])
def test_image_parts(extension: str) -> None:
    assert is_image_part(extension)


@pytest.mark.parametrize("extension", ["json", "txt", "gif", "v1.png", ".png", "0.json", "pickle"])
def test_other_parts_are_no_images(extension: str) -> None:
    assert not is_image_part(extension)


def test_a_caption_comes_from_txt_or_json() -> None:
    assert parse_sample("k", {"png": b"i", "txt": "ein Käse\n".encode()}).caption == "ein Käse"
    assert parse_sample("k", {"png": b"i", "txt": b"one", **parts(caption="two")}).caption == "two"
    assert parse_sample("k", {"png": b"i", "txt": b" "}).caption is None


def test_every_form_of_question() -> None:
    one = parse_sample("k", parts(question="Why?", answers=["b", "a", "a"], question_id=7, type="why"))
    assert one.questions == (Question("Why?", ("b", "a", "a"), "why", 7),)
    assert one.questions[0].answer == "a"
    official = parse_sample("k", parts(question="Why?", answers=[{"answer": "x", "answer_id": 1}]))
    assert official.questions[0].answers == ("x",)
    several = parse_sample("k", parts(qa=[{"question": "A?", "answer": "yes"}, {"question": "B?", "answer": 3}]))
    assert [(q.text, q.answer) for q in several.questions] == [("A?", "yes"), ("B?", "3")]


def test_equally_frequent_answers_give_the_first() -> None:
    assert Question("?", ("b", "a", "a", "b")).answer == "b"


def test_other_fields_are_kept_and_known_ones_are_not_doubled() -> None:
    sample = parse_sample("k", parts(caption="c", licence="CC0", objects=[1]))
    assert sample.extra == {"licence": "CC0", "objects": [1]}


def test_plain_string_content_becomes_a_text_part() -> None:
    sample = parse_sample("k", parts(messages=[{"role": "user", "content": "hi"}]))
    assert sample.messages == ({"role": "user", "content": [{"type": "text", "text": "hi"}]},)


def test_unknown_parts_are_passed_over_undecoded() -> None:
    assert parse_sample("k", {"txt": b"t", "pickle": b"cos\nsystem\n(S'false'\ntR."}).caption == "t"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"json": b"{"}, "can not be read"),
        ({"json": b"[" * 100_000}, "can not be read"),
        ({"json": b"[1]"}, "one JSON object"),
        ({"json": b"\xff\xfe"}, "UTF-8"),
        ({"txt": b"\xe9"}, "UTF-8"),
        (parts(question=" ", answer="a"), "question is empty"),
        (parts(question="?"), "an answer to '?'"),
        (parts(question="?", answer=""), "an answer to '?' is empty"),
        (parts(question="?", answers=[]), "no answers"),
        (parts(question="?", answer="a", question_id="x"), "question_id 'x'"),
        (parts(qa={"question": "?"}), "qa is not a list"),
        (parts(caption=["c"]), "caption is a list"),
        (parts(messages="hi"), "messages is not a list"),
        (parts(messages=[{"role": "tool", "content": "x"}]), "role 'tool'"),
        (parts(messages=[{"role": "user", "content": [{"type": "video"}]}]), "content of a user message"),
        (parts(messages=[{"role": "user", "content": [{"type": "image"}]}]), "1 image places for 0 images"),
        (parts(note="x"), "nothing usable"),
        ({"gif": b"GIF89a"}, "nothing usable"),
    ],
)
def test_faults_are_one_line_and_name_the_key(files: dict[str, bytes], says: str) -> None:
    with pytest.raises(SampleError) as caught:
        parse_sample("a/000017", files)
    assert says in str(caught.value) and "a/000017" in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, UsageError)


def test_pair_text_is_the_caption_else_question_and_answer() -> None:
    assert pair_text(parse_sample("k", parts(caption="c", question="?", answer="a"))) == "c"
    assert pair_text(parse_sample("k", parts(question="Why?", answer="so"))) == "Why? so"
    assert pair_text(parse_sample("k", parts(text="t"))) is None


def test_every_document_becomes_a_conversation() -> None:
    messages = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "ok"}]
    sample = parse_sample(
        "k", {"0.png": b"", "1.png": b"", **parts(caption="c", question="q?", answer="a", messages=messages)}
    )
    documents = conversations(sample, "Describe.")
    assert [question for _, question in documents] == [None, sample.questions[0], None]
    image, reply = {"type": "image"}, {"role": "assistant", "content": [{"type": "text", "text": "c"}]}
    asked = {"role": "user", "content": [image, image, {"type": "text", "text": "Describe."}]}
    assert documents[0][0] == [asked, reply]
    assert documents[1][0][0]["content"][-1] == {"type": "text", "text": "q?"}
    assert documents[2][0] == list(sample.messages)


def test_text_and_captions_without_pictures_are_no_conversation() -> None:
    assert conversations(parse_sample("k", parts(text="t", caption="c")), "Describe.") == []


def test_several_captions_are_all_kept_in_order() -> None:
    sample = parse_sample("a", {"png": b"", "json": b'{"captions": ["one", " ", "two", "three"], "caption": "two"}'})
    assert sample.caption == "two" and sample.captions == ("two", "one", "three")
    assert parse_sample("a", {"json": b'{"captions": ["one", "two"]}'}).captions == ("one", "two")
    prompts = [messages[1]["content"][0]["text"] for messages, _ in conversations(sample, "Describe it.")]
    assert prompts == ["two", "one", "three"] and pair_texts(sample) == ("two", "one", "three")
    with pytest.raises(SampleError, match="captions is a str; write a list of strings"):
        parse_sample("a", {"json": b'{"captions": "one"}'})
