"""Other people's files as they come: what a source reads, made for a test; and how what it read is looked at."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import webdataset
from PIL import Image

from vlm.data_tools.sources import Record, Skipped


def encoded(number: int, kind: str = "JPEG") -> bytes:
    """A picture like no other."""
    drawn = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(drawn).save(file, kind)
    return file.getvalue()


def bytes_of(record: Record) -> list[bytes]:
    return [image if isinstance(image, bytes) else Path(image).read_bytes() for image in record.images]


def says(skipped: list[Skipped], *parts: str) -> bool:
    """Whether there is one thing skipped, and its reason has all these parts."""
    return len(skipped) == 1 and all(part in skipped[0].reason for part in parts)


def coco(images: int, captions: int = 5, **more: Any) -> dict[str, Any]:
    """captions_*.json: ids that are not in order, and annotations of one image that do not stand together."""
    ids = [(number * 7919 + 13) % 100_003 for number in range(images)]
    listed = [{"license": 1, "file_name": f"{n}.jpg", "height": 8, "width": 8, "id": id} for n, id in enumerate(ids)]
    said = [
        {"image_id": id, "id": 1000 * c + n, "caption": f"caption {c} of {n}\n"}
        for c in range(captions)
        for n, id in enumerate(ids)
    ]
    return {"info": {"year": 2017}, "images": listed, "licenses": [], "annotations": said} | more


def vqa(images: int, each: int = 3, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The files of questions and of annotations, the latter in another order."""
    asked = [
        {"image_id": image, "question": f"Question {n} of {image}?", "question_id": 1000 * image + n}
        for image in range(images)
        for n in range(each)
    ]
    answered = [
        {
            "question_type": "what is",
            "multiple_choice_answer": "red",
            "answers": [{"answer": f"answer {n}", "answer_confidence": "yes", "answer_id": n + 1} for n in range(10)],
            "image_id": question["image_id"],
            "answer_type": "other",
            "question_id": question["question_id"],
        }
        for question in reversed(asked)
    ]
    head = {"info": {}, "data_type": "mscoco", "data_subtype": "val2014", "license": {}} | more
    return head | {"questions": asked}, head | {"annotations": answered}


def turns(*said: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(said)]


def crawl(
    folder: Path, shard: int, count: int = 5, failed: int = 2, *, tells: bool = True, caption: bool = True
) -> Path:
    """A shard as img2dataset writes it, with its own library: .jpg, .json, .txt; parquet and stats of all addresses."""
    folder.mkdir(exist_ok=True)
    lines = []
    with webdataset.TarWriter(str(folder / f"{shard:05d}.tar"), mtime=0) as tar:
        for number in range(count + failed):
            key, good = f"{shard:05d}{number:04d}", number < count
            meta = {"url": f"http://x/{number}", "caption": f"caption {number} of {shard}", "key": key}
            meta |= {"status": "success" if good else "failed_to_download", "width": 8, "exif": "{}"}
            lines.append(dict(meta))
            if not caption:
                del meta["caption"]
            if good:
                text = {"txt": lines[-1]["caption"]} if caption else {}
                image = encoded(100 * shard + number)
                tar.write({"__key__": key, "jpg": image, "json": json.dumps(meta, indent=4)} | text)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), folder / f"{shard:05d}.parquet")
    if tells:
        told = {"count": count + failed, "successes": count, "failed_to_download": failed, "failed_to_resize": 0}
        told["status_dict"] = {"success": count, "HTTP Error 404: Not Found": failed}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(told))
    return folder / f"{shard:05d}.tar"


def tar_of(path: Path, members: list[tuple[str, bytes | str]]) -> Path:
    """A tar of these, bytes as files, `> name` as symbolic and `= name` as hard links, other words as other things."""
    kinds = {"folder": tarfile.DIRTYPE, "pipe": tarfile.FIFOTYPE, "device": tarfile.CHRTYPE}
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
            elif content in kinds:
                member.type = kinds[content]
            else:
                member.type = tarfile.SYMTYPE if content.startswith(">") else tarfile.LNKTYPE
                member.linkname = content[2:]
            tar.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def pair(key: str, number: int = 0, caption: str = "c") -> list[tuple[str, bytes | str]]:
    return [(f"{key}.jpg", encoded(number)), (f"{key}.txt", caption.encode())]
