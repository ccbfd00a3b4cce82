"""What a call's arguments must be, and how many of them go through the model together.

Knows lists, lengths and when two pictures are the same. Knows nothing of what is asked of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from vlm.errors import UsageError
from vlm.model import VLMModel

Item = TypeVar("Item")


def as_list(items: Any) -> list[Any]:
    """A list or tuple as a list; anything else as a list of that one."""
    return list(items) if isinstance(items, (list, tuple)) else [items]


def parts(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items, at most `size` at a time, each taken when it is needed. Raises UsageError for a size below 1."""
    if size < 1:
        raise UsageError(f"batch_size is {size}; it must be at least 1")
    left = iter(items)
    return iter(lambda: list(islice(left, size)), [])


def picture_key(image: Any) -> Any:
    """Equal for what is surely the same picture: the same path, or the same object."""
    return str(image) if isinstance(image, (str, Path)) else id(image)


def filled(text: str, what: str) -> str:
    """The text. Raises UsageError where nothing is written in it."""
    if not text.strip():
        raise UsageError(f"the {what} is empty; write at least one word")
    return text


def check_length(model: VLMModel, length: int) -> None:
    """Raises UsageError for more tokens than the language model takes."""
    limit = model.max_tokens
    if limit is not None and length > limit:
        raise UsageError(f"the text has {length} tokens and the language model takes {limit}; shorten it")
