"""Captions of many pictures, shared out to processes. Knows folders of pictures; nothing of how one is described."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.api import load
from vlm.errors import UsageError
from vlm.processes import Share, in_processes
from vlm.processing import user_turn
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
    captions: dict[int, str] = {}
    for told in in_processes(_captions, replicas, model, names, device, options, mend=MEND):
        captions |= told
    return [captions[number] for number in range(len(names))]


def _captions(model: str, names: list[str], device: str, options: dict[str, Any], share: Share) -> dict[int, str]:
    """By the pictures' numbers."""
    own = share.of(len(names))
    vlm = load(model, device=share.take(device), at_once=len(own))
    asked = (user_turn([names[number]], vlm.processor.caption_prompt) for number in own)
    return dict(vlm.generate_each(asked, numbers=own, **options))
