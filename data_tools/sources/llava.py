"""LLaVA's conversations: turns of a human and of a model, `<image>` where a picture stands.

Knows that layout, as one JSON list or as JSON lines. Knows nothing of chat templates or of how a picture is shown to a
model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vlm.errors import UsageError

from .base import Record, Source, image_paths, lines_in, need_file, opened
from .json_stream import json_items, json_text

IMAGE = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class LlavaConversations(Source):
    """A row is an entry as JSON with its number: the place in the list, or the line.

    `<image>` stands for a picture in what a human says; in an answer it is a text like any other. The key is the number.
    """

    empty = 'give a list of {"image": …, "conversations": […]}'

    def __init__(self, src: Path, images: Path | None) -> None:
        need_file(src)
        super().__init__(src, images)

    def rows(self, scratch: Path) -> Iterator[tuple[int, bytes]]:
        """Number, from 1, and JSON of each entry."""
        if self._is_list():
            entries = enumerate(json_items(self.src, "item"), start=1)
            yield from ((number, json_text(self.src, entry).encode()) for number, entry in entries)
        else:
            with opened(self.src) as file:
                yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())

    def count(self) -> int:
        """Entries of the list, or lines."""
        return sum(1 for _ in json_items(self.src, "item")) if self._is_list() else lines_in(self.src)

    def _is_list(self) -> bool:
        with opened(self.src) as file:
            return file.read(2**16).lstrip().startswith(b"[")

    def records(self, row: tuple[int, bytes]) -> Iterable[Record]:
        """The one sample of an entry: its messages, and its other fields as they are."""
        number, text = row
        place = f"{self.src} entry {number}"
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{place}: not JSON ({error}); write one list of objects, or one object a line") from None
        if not isinstance(fields, dict) or not isinstance(fields.get("conversations"), list):
            raise UsageError(
                f'{place}: no list of "conversations"; write {{"conversations": [{{"from": …, "value": …}}]}}'
            )
        if isinstance(fields.get("image"), list):
            fields["images"] = fields.pop("image")
        paths = image_paths(place, fields)
        fields["messages"] = [_message(place, turn) for turn in fields.pop("conversations")]
        _check(place, fields, len(paths))
        return [Record(place, f"{number:08d}", fields, tuple(map(self.image, paths)))]


def _message(place: str, turn: Any) -> dict[str, Any]:
    said, speaker = (turn.get("value"), turn.get("from")) if isinstance(turn, dict) else (None, None)
    if not isinstance(said, str) or not isinstance(speaker, str) or speaker not in _ROLES:
        raise UsageError(f'{place}: a turn from {speaker!r}; write {{"from": "human", "gpt" or "system", "value": …}}')
    role = _ROLES[speaker]
    content = _with_images(said) if role == "user" else [{"type": "text", "text": said}]
    if not any(part["type"] == "image" or part["text"].strip() for part in content):
        raise UsageError(f"{place}: a turn from {speaker!r} says nothing; fill it in or drop it")
    return {"role": role, "content": content}


def _with_images(said: str) -> list[dict[str, Any]]:
    """The text in parts. A line break beside a picture only parts it from the text, and goes."""
    content: list[dict[str, Any]] = []
    pieces = said.split(IMAGE)
    for number, piece in enumerate(pieces):
        if number:
            content.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if number < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece.strip():
            content.append({"type": "text", "text": piece})
    return content


def _check(place: str, fields: dict[str, Any], images: int) -> None:
    """Raise UsageError where pictures and their places are not as many, or nobody answers."""
    messages = fields["messages"]
    places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if places != images:
        raise UsageError(f"{place}: {images} images and {places} {IMAGE}; give as many of one as of the other")
    if fields.get("video"):
        raise UsageError(f"{place}: a video; take pictures from it and give these")
    if not any(message["role"] == "assistant" for message in messages):
        raise UsageError(f"{place}: {len(messages)} turns and no answer; give one from 'gpt'")
