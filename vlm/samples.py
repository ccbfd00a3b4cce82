"""What one sample is: pictures, a caption, questions, a conversation or plain text, under one key.

Knows the names of the parts and the JSON fields of `interface.md`. Knows nothing of tensors, tokenizers, tars or how a
picture is decoded.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm.errors import UsageError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
ROLES = ("system", "user", "assistant")
_IMAGE_PART = re.compile(rf"(?:(\d+)\.)?({'|'.join(IMAGE_EXTENSIONS)})")
_FIELDS = frozenset(
    ("caption", "captions", "question", "answer", "answers", "type", "question_id", "qa", "messages", "text")
)


class SampleError(UsageError):
    """A sample that can not be what it says it is; the message names its key."""


@dataclass(frozen=True)
class Question:
    """A question about the sample's pictures with everything that people answered to it (at least one answer)."""

    text: str
    answers: tuple[str, ...]
    type: str | None = None
    id: int | None = None

    @property
    def answer(self) -> str:
        """The answer given most often; of equally frequent ones the first."""
        return Counter(self.answers).most_common(1)[0][0]


@dataclass(frozen=True)
class Sample:
    """Everything stored under one key. `images` are encoded files in their order, not decoded pictures."""

    key: str
    images: tuple[bytes, ...] = ()
    caption: str | None = None
    questions: tuple[Question, ...] = ()
    messages: tuple[dict[str, Any], ...] = ()
    text: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    other_captions: tuple[str, ...] = ()

    @property
    def captions(self) -> tuple[str, ...]:
        """Everything that was said of the pictures as a whole; `caption` comes first."""
        return (self.caption, *self.other_captions) if self.caption else ()


def is_image_part(extension: str) -> bool:
    """Whether a part of this name is a picture: `png`, or `0.png` for the first of several."""
    return _IMAGE_PART.fullmatch(extension.lower()) is not None


def parse_sample(key: str, parts: Mapping[str, bytes]) -> Sample:
    """Make a sample of its files, `{"png": …, "json": …}` or `{"0.jpg": …, "1.jpg": …}`.

    Parts of other names are passed over, never decoded. Raises SampleError for JSON that can not be read, an empty
    question or answer, a conversation with more image places than images, or a sample that holds nothing.
    """
    images = tuple(parts[name] for name in sorted(filter(is_image_part, parts), key=_image_order))
    beside = _utf8(key, "txt", parts["txt"]).strip() if "txt" in parts else None
    return make_sample(key, _json_fields(key, parts), images, beside)


def make_sample(key: str, fields: Mapping[str, Any], images: Sequence[bytes], beside: str | None = None) -> Sample:
    """Make a sample of its JSON fields and encoded images; `beside` is the caption where the fields have none.

    Raises SampleError as `parse_sample` does.
    """
    listed = _captions(key, fields.get("captions"))
    caption = fields.get("caption")
    caption = _optional_text(key, "caption", beside if caption is None else caption) or (listed[0] if listed else None)
    sample = Sample(
        key=key,
        images=tuple(images),
        caption=caption,
        questions=_questions(key, fields),
        messages=_messages(key, fields.get("messages"), len(images)),
        text=_optional_text(key, "text", fields.get("text")),
        extra={name: value for name, value in fields.items() if name not in _FIELDS},
        other_captions=tuple(other for other in listed if other != caption),
    )
    if not (sample.images or sample.caption or sample.questions or sample.messages or sample.text):
        raise SampleError(f"sample {key}: nothing usable in {sorted(fields)}; give an image, .txt or .json part")
    return sample


def pair_texts(sample: Sample) -> tuple[str, ...]:
    """The texts that belong to the sample's pictures as a whole: its captions, else its first question and answer."""
    if sample.caption:
        return sample.captions
    if sample.questions:
        return (f"{sample.questions[0].text} {sample.questions[0].answer}",)
    return ()


def pair_text(sample: Sample) -> str | None:
    """The first of `pair_texts`."""
    return next(iter(pair_texts(sample)), None)


def plain_texts(sample: Sample) -> tuple[tuple[str, bool], ...]:
    """The plain text of a sample and whether it ends there: one, or each document of a block that `vlm data text` has
    packed, of which a long one goes on in the next block; none without `text`.

    Raises SampleError for a document that lies outside the text.
    """
    if sample.text is None:
        return ()
    documents = sample.extra.get("documents")
    listed = documents if isinstance(documents, list) else []
    parts = [document for document in listed if isinstance(document, dict) and "characters" in document]
    cut = (_cut_out(sample.key, sample.text, part["characters"]) for part in parts)
    ends = (part.get("ends") is not False for part in parts)
    return tuple(zip(cut, ends, strict=True)) or ((sample.text, True),)


def _cut_out(key: str, text: str, place: Any) -> str:
    if isinstance(place, list) and len(place) == 2 and all(type(end) is int for end in place):
        first, last = place
        if 0 <= first < last <= len(text):
            return text[first:last]
    raise SampleError(f"sample {key}: characters {place} of a document, text has {len(text)}; write [first, last]")


def said(sample: Sample) -> list[str]:
    """Every text of a sample, in order: captions, plain text, questions with all that was answered, messages."""
    asked = [text for question in sample.questions for text in (question.text, *question.answers)]
    spoken = [part["text"] for message in sample.messages for part in message["content"] if part["type"] == "text"]
    return [*sample.captions, *filter(None, [sample.text]), *asked, *spoken]


def conversations(sample: Sample, caption_prompt: str) -> list[tuple[list[dict[str, Any]], Question | None]]:
    """Every training document of a sample as chat messages, with the question it asks (None for caption and chat).

    Each caption answers `caption_prompt`; each question is a document of its own; the sample's messages are one as they
    stand. A sample of plain text has none.
    """
    documents: list[tuple[list[dict[str, Any]], Question | None]] = []
    if sample.images:
        documents += [(_exchange(sample, caption_prompt, caption), None) for caption in sample.captions]
    for question in sample.questions:
        documents.append((_exchange(sample, question.text, question.answer), question))
    if sample.messages:
        documents.append((list(sample.messages), None))
    return documents


def _exchange(sample: Sample, prompt: str, reply: str) -> list[dict[str, Any]]:
    content = [{"type": "image"} for _ in sample.images] + [{"type": "text", "text": prompt}]
    return [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": reply}]},
    ]


def _image_order(extension: str) -> tuple[int, str]:
    match = _IMAGE_PART.fullmatch(extension.lower())
    assert match is not None
    return int(match[1] or -1), extension


def _utf8(key: str, extension: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleError(f"sample {key}: .{extension} is not UTF-8 at byte {error.start}; save it as UTF-8") from None


def _json_fields(key: str, parts: Mapping[str, bytes]) -> dict[str, Any]:
    if "json" not in parts:
        return {}
    try:
        fields = json.loads(_utf8(key, "json", parts["json"]))
    except (json.JSONDecodeError, RecursionError) as error:
        raise SampleError(f"sample {key}: .json can not be read ({error}); write one JSON object") from None
    if not isinstance(fields, dict):
        raise SampleError(f"sample {key}: .json holds a {type(fields).__name__}; write one JSON object")
    return fields


def _text(key: str, name: str, value: Any) -> str:
    if isinstance(value, bool | int | float):
        value = str(value)
    if not isinstance(value, str):
        raise SampleError(f"sample {key}: {name} is a {type(value).__name__}; write a string")
    if not value.strip():
        raise SampleError(f"sample {key}: {name} is empty; fill it in or drop the field")
    return value


def _optional_text(key: str, name: str, value: Any) -> str | None:
    """An empty caption or text counts as none: scraped sets are full of them and the rest of the sample is good."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return _text(key, name, value)


def _captions(key: str, captions: Any) -> tuple[str, ...]:
    if captions is None:
        return ()
    if not isinstance(captions, list):
        raise SampleError(f"sample {key}: captions is a {type(captions).__name__}; write a list of strings")
    given = (_optional_text(key, "one of captions", caption) for caption in captions)
    return tuple(caption for caption in given if caption is not None)


def _questions(key: str, fields: Mapping[str, Any]) -> tuple[Question, ...]:
    entries = fields.get("qa") or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SampleError(f'sample {key}: qa is not a list of objects; write [{{"question": …, "answer": …}}]')
    single = [fields] if fields.get("question") is not None else []
    return tuple(_question(key, entry) for entry in [*single, *entries])


def _question(key: str, entry: dict[str, Any]) -> Question:
    text = _text(key, "question", entry.get("question"))
    answers = entry.get("answers")
    if answers is None:
        answers = [entry.get("answer")]
    if not isinstance(answers, list) or not answers:
        raise SampleError(f"sample {key}: question {text!r} has no answers; write a list of at least one")
    # The official VQA files give each person's answer as an object.
    plain = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
    identity, kind = entry.get("question_id"), entry.get("type")
    if identity is not None and type(identity) is not int:
        raise SampleError(f"sample {key}: question_id {identity!r} is not a whole number; write an integer")
    return Question(
        text=text,
        answers=tuple(_text(key, f"an answer to {text!r}", answer) for answer in plain),
        type=kind if isinstance(kind, str) else None,
        id=identity,
    )


def _messages(key: str, messages: Any, images: int) -> tuple[dict[str, Any], ...]:
    if messages is None:
        return ()
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise SampleError(f'sample {key}: messages is not a list of objects; write [{{"role": …, "content": …}}]')
    parsed = tuple(_message(key, message) for message in messages)
    places = sum(part["type"] == "image" for message in parsed for part in message["content"])
    if places > images:
        raise SampleError(f"sample {key}: messages have {places} image places for {images} images; add the images")
    return parsed


def _message(key: str, message: dict[str, Any]) -> dict[str, Any]:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise SampleError(f"sample {key}: role {role!r} in messages; use one of {', '.join(ROLES)}")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(_is_part(part) for part in content):
        raise SampleError(
            f'sample {key}: content of a {role} message; write a list of {{"type": "image"}} and '
            '{"type": "text", "text": …}'
        )
    return {"role": role, "content": [dict(part) for part in content]}


def _is_part(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    return part.get("type") == "image" or (part.get("type") == "text" and isinstance(part.get("text"), str))
