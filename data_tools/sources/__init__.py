"""The formats that `vlm data convert` reads, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm.errors import UsageError

from .base import FLAGS, Record, Skipped, Source
from .coco import CocoCaptions
from .csv_table import CsvTable
from .folder import ClassFolders
from .img2dataset import Img2Dataset
from .jsonl import JsonLines
from .llava import LlavaConversations
from .vqa import VqaQuestions

SOURCES: dict[str, type[Source]] = {
    "jsonl": JsonLines,
    "coco": CocoCaptions,
    "vqa": VqaQuestions,
    "llava": LlavaConversations,
    "csv": CsvTable,
    "folder": ClassFolders,
    "img2dataset": Img2Dataset,
}

__all__ = ["SOURCES", "Record", "Skipped", "Source", "open_source"]


def open_source(format: str, src: Path, images: Path | None = None, **options: Any) -> Source:
    """The source of a format. Raises UsageError for a format that is not known and for an option that is not the format's."""
    if format not in SOURCES:
        raise UsageError(f"format {format!r} is not known; use one of {', '.join(SOURCES)}")
    kind = SOURCES[format]
    for name in options:
        if name not in kind.options:
            takes = ", ".join(FLAGS[option] for option in kind.options) or "no options"
            raise UsageError(f"{FLAGS.get(name, name)}: not for {format}, which takes {takes}; leave it out")
    return kind(src, images, **options)
