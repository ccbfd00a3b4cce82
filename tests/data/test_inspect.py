"""`vlm data inspect`: every number is right, every fault is found and named beside the others, and a fault is exit code 1."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm.cli import run
from vlm.data_tools.inspect import inspect
from vlm.errors import UsageError
from vlm.shards import ShardWriter


def png(seed: int = 0, size: tuple[int, int] = (8, 6)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def fields(**values: Any) -> bytes:
    return json.dumps(values).encode()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Four samples in two shards: caption and questions, two images, a conversation, plain text."""
    colour = {"question": "What colour is it?", "answer": "red", "type": "colour"}
    with ShardWriter(tmp_path / "set", samples_per_shard=2) as writer:
        writer.write(
            "a", {"png": png(0), "json": fields(caption="a red square", qa=[colour, colour | {"answer": "blue"}])}
        )
        writer.write(
            "b", {"0.png": png(1, (20, 6)), "1.png": png(2), "json": fields(question="Same?", answer="not at all")}
        )
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hm hm?"}]}]
        writer.write("c", {"png": png(3), "json": fields(messages=chat, caption="a red square")})
        writer.write("d", {"json": fields(text="five words of plain text")})
    return tmp_path / "set"  # fmt: skip


def flip(tar: Path, place: int) -> None:
    data = bytearray(tar.read_bytes())
    data[place] ^= 0x40
    tar.write_bytes(data)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_everything_is_counted(shards: Path) -> None:
    report = inspect(shards)
    assert report.faults == [] and (report.shards, report.samples, report.distinct_captions) == (2, 4, 1)
    assert report.bytes == sum(path.stat().st_size for path in shards.glob("*.tar"))
    assert report.holding == {"images": 3, "caption": 2, "questions": 2, "messages": 1, "text": 1}
    assert report.images_per_sample == [1, 2, 1, 0]
    assert report.widths == [8, 20, 8, 8] and report.heights == [6] * 4
    assert dict(report.words) == {
        "caption": [3, 3], "question": [4, 4, 1], "answer": [1, 1, 3], "conversation": [2], "text": [5]
    }  # fmt: skip
    assert report.answers == {"colour": {"red": 1, "blue": 1}, "untyped": {"not at all": 1}}


def test_the_rows_say_it_in_words(shards: Path) -> None:
    rows = dict(inspect(shards).rows())
    assert rows["samples"] == "4" and rows["  with images"] == "3" and rows["faults"] == "0"
    assert rows["images per sample"] == "1 (from 0 to 2)"
    assert rows["width × height"] == "8 (from 8 to 20) × 6 (from 6 to 6)"
    assert rows["questions: colour"] == "2: red 50.0%, blue 50.0%"


def test_the_table_is_printed_and_a_sound_set_is_exit_0(shards: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(["data", "inspect", str(shards)]) == 0
    out, err = capsys.readouterr()
    printed = [" ".join(line.strip("│ ").replace("│", "").split()) for line in out.splitlines()]
    assert {"samples 4", "with caption 2", "distinct captions 1", "faults 0"} <= set(printed) and err == ""


@pytest.mark.parametrize("source", ["00000.tar", "{00000..00001}.tar"])
def test_a_tar_or_a_range_of_them_needs_no_index(shards: Path, source: str) -> None:
    (shards / "index.json").unlink()
    report = inspect(shards / source)
    assert report.faults == [] and report.samples == (2 if source == "00000.tar" else 4)


def test_data_is_not_markup(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    answer = {"question": "q", "answer": "[bold]loud[/nonsense]", "type": "[red]"}
    with ShardWriter(tmp_path / "set") as writer:
        writer.write("a", {"json": fields(**answer)})
    assert run(["data", "inspect", str(tmp_path / "set")]) == 0
    assert "[bold]loud[/nonsense] 100.0%" in capsys.readouterr().out


# Faults


def append_bad_samples(shards: Path) -> None:
    """One of each fault that a sample can have, in a tar that the index is right about."""
    with ShardWriter(shards.parent / "bad") as writer:
        writer.write("e", {"png": png()[:60], "json": fields(caption="cut")})
        writer.write("f", {"png": b"<html>", "json": fields(caption="no picture")})
        writer.write("g", {"png": png(), "json": b"{"})
        writer.write("h", {"png": png(), "json": fields(question=" ", answer="x")})
        writer.write(
            "i", {"0.png": png(), "1.png": png(), "json": fields(messages=[{"role": "user", "content": "no place"}])}
        )
        writer.write("j", {"json": fields(text="the last one is sound")})  # fmt: skip


def test_broken_samples_are_named_and_do_not_hide_each_other(shards: Path) -> None:
    append_bad_samples(shards)
    report = inspect(shards.parent / "bad")
    said = [
        "image 0 of sample e: damaged or truncated",
        "image 0 of sample f: not a JPEG, PNG or WebP file",
        "sample g: .json can not be read",
        "sample h: question is empty",
        "sample i: messages place 0 of 2 images",
    ]
    assert len(report.faults) == len(said) and report.samples == 6 and report.words["text"] == [5]
    for fault, words in zip(report.faults, said, strict=True):
        assert words in fault and "bad/00000.tar: " in fault and "\n" not in fault


DAMAGES = {
    "a flipped byte of a picture": (lambda s: flip(s / "00000.tar", 600), "00000.tar: sha256 "),
    "a flipped byte of padding": (lambda s: flip(s / "00001.tar", -1), "bytes have changed"),
    "a flipped byte of a header": (lambda s: flip(s / "00000.tar", 3), "00000.tar: sha256 "),
    "no index": (lambda s: (s / "index.json").unlink(), "no index.json; a conversion that was cut short?"),
    "an index that is no JSON": (lambda s: (s / "index.json").write_text("{"), "index.json: can not be read"),
    "a lost shard": (lambda s: (s / "00001.tar").unlink(), "00001.tar: missing, index.json lists it"),
    "a stray shard": (lambda s: write_tar(s / "x.tar", {"z.txt": b"z"}), "x.tar: not in index.json"),
    "a shard cut short": (
        lambda s: (s / "00001.tar").write_bytes((s / "00001.tar").read_bytes()[:700]),
        "00001.tar: 700 bytes, index.json says ",
    ),
    "a key in two shards": (lambda s: write_tar(s / "00001.tar", {"a.txt": b"again"}), "key a is in "),
    "a key twice in one": (
        lambda s: write_tar(s / "00001.tar", {"x.txt": b"1", "y.txt": b"2", "x.json": b"{}"}),
        "key x comes twice",
    ),
    "dots in a key": (lambda s: write_tar(s / "00001.tar", {"img.v1.txt": b"1"}), "has dots in its key"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_named_and_exit_1(damage: str, shards: Path, capsys: pytest.CaptureFixture) -> None:
    break_it, says = DAMAGES[damage]
    break_it(shards)
    faults = inspect(shards).faults
    assert any(says in fault for fault in faults) and all("\n" not in fault for fault in faults)
    assert run(["data", "inspect", str(shards)]) == 1
    out, err = capsys.readouterr()
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults, the first"
    assert err == f"error: {shards}: {count}: {faults[0]}\n"
    assert "fault: " in out and "samples" in out, "what could be read is counted all the same"


def test_any_flipped_byte_is_found(shards: Path) -> None:
    tar = shards / "00000.tar"
    sound = tar.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(sound), 60):
        flip(tar, int(place))
        assert inspect(shards).faults, place
        tar.write_bytes(sound)
    assert inspect(shards).faults == []


def test_more_faults_than_a_screen_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with ShardWriter(tmp_path / "set") as writer:
        for number in range(33):
            writer.write(str(number), {"png": b"x"})
    assert run(["data", "inspect", str(tmp_path / "set")]) == 1
    out, err = capsys.readouterr()
    assert out.count("fault: ") == 20 and "… and 13 faults more" in out and "33 faults, the first: " in err


def test_what_is_nothing_to_look_at_names_the_mend(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, says in (
        (tmp_path / "none", "none: no such shard; make one with"),
        (tmp_path / "empty", "empty: no shards; give a folder of .tar files"),
        (tmp_path, "no shards; give one of its folders set"),
    ):
        with pytest.raises(UsageError) as refusal:
            inspect(path)
        assert says in str(refusal.value) and "\n" not in str(refusal.value)
