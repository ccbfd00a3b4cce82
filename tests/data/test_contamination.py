"""Evaluation samples in training shards: found through other words, other files of a picture, and nothing else."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm.cli import run
from vlm.data_tools.contamination import Found, HeldOut, contamination
from vlm.errors import UsageError
from vlm.shards import ShardWriter


def picture(seed: int) -> Image.Image:
    spots = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(spots).resize((64, 64), Image.Resampling.BICUBIC)


def encoded(seed: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, kind)
    return file.getvalue()


@pytest.fixture
def train(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "train", samples_per_shard=10) as writer:
        for seed in range(25):
            writer.write(f"t{seed}", {"png": encoded(seed), "json": json.dumps({"caption": f"number {seed}"}).encode()})
        writer.write("words", {"json": json.dumps({"text": "The sun rose over the cold hills that day."}).encode()})
        writer.write("broken", {"png": b"no picture", "json": b'{"caption": "broken"}'})
    return tmp_path / "train"


def test_the_same_picture_under_other_words_and_the_same_words_without_one(train: Path) -> None:
    held_out = [
        HeldOut("other", "number 3", [encoded(103)]),
        HeldOut("jpeg", "what is it", [encoded(7, "JPEG")]),
        HeldOut("lazy", "and this", [lambda: picture(24)]),
        HeldOut("text", "the sun rose over the cold hills that day", []),
        HeldOut("other text", "the moon rose over a warm sea at night", []),
        HeldOut("twin of jpeg", "asked again", [encoded(7)]),
    ]
    found = [Found("jpeg", "t7"), Found("lazy", "t24"), Found("text", "words"), Found("twin of jpeg", "t7")]
    assert contamination(train, held_out) == found


def test_alike_among_themselves_is_no_contamination(train: Path) -> None:
    assert contamination(train, [HeldOut("a", "x y z", [encoded(200)]), HeldOut("b", "x y z", [encoded(200)])]) == []


def test_a_held_out_picture_that_is_broken_is_named(train: Path) -> None:
    with pytest.raises(UsageError, match="a picture of sample a: not a JPEG"):
        contamination(train, [HeldOut("a", "x", [b"no picture"])])


def test_the_command(train: Path, tmp_path: Path, capsys) -> None:
    with ShardWriter(tmp_path / "test") as writer:
        for seed in (3, 300):
            fields = {"question": "what is it?", "answer": "a thing"}
            writer.write(f"e{seed}", {"png": encoded(seed), "json": json.dumps(fields).encode()})
    out = tmp_path / "found.json"
    arguments = ["eval", "contamination", str(train), "vqa", "--data", str(tmp_path / "test"), "--out", str(out)]
    assert run(arguments) == 0
    assert "vqa: 1 of 2 samples are in the training data: e3 (like t3)" in capsys.readouterr().out
    assert json.loads(out.read_text()) == {"vqa": {"n": 2, "found": [{"key": "e3", "like": "t3"}]}}
    for task in (["nonsense"], []):
        assert run(["eval", "contamination", str(train), *task, "--data", str(tmp_path / "test")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
