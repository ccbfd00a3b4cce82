"""Captions of many pictures, shared out to processes. Knows folders of pictures; nothing of how one is described."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.api import load
from vlm.errors import UsageError
from vlm.processes import Share, in_processes
from vlm.samples import IMAGE_EXTENSIONS

MEND = "if memory ran out, lower --replicas"


def pictures_in(places: Sequence[Path]) -> list[Path]:
    """The files that are named, and in place of a folder its pictures by name. Raises UsageError for a folder of none."""
    found: list[Path] = []
    for place in places:
        if not place.is_dir():
            found.append(place)
            continue
        inside = sorted(file for file in place.iterdir() if file.suffix[1:].lower() in IMAGE_EXTENSIONS)
        if not inside:
            raise UsageError(f"{place}: no picture is in the folder; give one with {', '.join(IMAGE_EXTENSIONS)} files")
        found += inside
    return found


def caption_all(
    model: str, pictures: Sequence[Path], device: str = "auto", replicas: int = 1, **options: Any
) -> list[str]:
    """A caption of each picture, in their order, by so many processes with a model each. options: as in `VLM.caption`."""
    if replicas < 1:
        raise UsageError(f"replicas is {replicas}; it must be at least 1")
    names, replicas = [str(picture) for picture in pictures], min(replicas, len(pictures))
    if replicas == 1:
        return load(model, device=device, at_once=len(names)).caption(names, **options)
    captions = [""] * len(names)
    shared = in_processes(_captions, replicas, model, names, device, options, mend=MEND)
    for process, texts in enumerate(shared):
        for number, text in zip(Share(process, replicas).of(len(names)), texts, strict=True):
            captions[number] = text
    return captions


def _captions(model: str, names: list[str], device: str, options: dict[str, Any], share: Share) -> list[str]:
    own = [names[number] for number in share.of(len(names))]
    return load(model, device=share.take(device), at_once=len(own)).caption(own, **options)
