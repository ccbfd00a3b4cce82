"""Shards and tars with what a test puts into them, and pictures and fields to put there."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm.shards import ShardWriter


def png(seed: int = 0, size: tuple[int, int] = (8, 6)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def fields(**values: Any) -> bytes:
    return json.dumps(values).encode()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def write_set(folder: Path, samples: dict[str, dict[str, bytes]], per_shard: int) -> Path:
    with ShardWriter(folder, samples_per_shard=per_shard) as writer:
        for key, parts in samples.items():
            writer.write(key, parts)
    return folder
