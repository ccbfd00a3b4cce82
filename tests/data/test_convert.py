"""`vlm data convert`: what goes in comes out, every fault is one line with its place, and a failure leaves nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vlm.data_tools.convert
from vlm.data_tools.convert import Converted, convert
from vlm.data_tools.engines import LocalEngine
from vlm.data_tools.inspect import inspect
from vlm.errors import RunError, UsageError
from vlm.shards import Shards


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with `0.png`, `1.jpg`, `2.webp`."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, extension in enumerate(("png", "jpg", "webp")):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.{extension}")
    return folder


@pytest.fixture
def source(tmp_path: Path):
    """Writes a source file, a line for each of what is given: an object, or bytes as they are."""

    def write(*lines: Any, name: str = "pairs.jsonl") -> Path:
        data = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        (tmp_path / name).write_bytes(b"\n".join(data) + b"\n")
        return tmp_path / name

    return write


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_images_keep_their_bytes_and_order_and_fields_their_values(source, pictures, tmp_path: Path) -> None:
    rows = [
        {"image": "0.png", "caption": "one", "licence": "CC0", "ünïcode": "ß"},
        {"images": ["2.webp", "0.png", "1.jpg"], "caption": "three"},
        {"text": "none at all"},
    ]
    assert convert(source(*rows), tmp_path / "out", images=pictures) == Converted(3, 0)
    shards = Shards.open(tmp_path / "out")
    assert [sample.caption or sample.text for sample in shards] == ["one", "three", "none at all"]
    assert shards[0].extra == {"image": "0.png", "licence": "CC0", "ünïcode": "ß"}
    assert shards[0].images == ((pictures / "0.png").read_bytes(),)
    assert shards[1].images == tuple((pictures / name).read_bytes() for name in ("2.webp", "0.png", "1.jpg"))
    assert [list(entry.read()) for entry in shards.entries][1] == ["0.webp", "1.png", "2.jpg", "json"]
    assert inspect(tmp_path / "out").faults == []


def test_more_than_ten_images_stay_in_order(source, pictures, tmp_path: Path) -> None:
    names = [f"{number % 3}.{('png', 'jpg', 'webp')[number % 3]}" for number in range(12)]
    convert(source({"images": names, "caption": "twelve"}), tmp_path / "out", images=pictures)
    assert Shards.open(tmp_path / "out")[0].images == tuple((pictures / name).read_bytes() for name in names)


def test_all_ten_answers_are_kept(source, pictures, tmp_path: Path) -> None:
    answers = ["red"] * 6 + ["dark red", "maroon", "red", "wine"]
    official = [{"answer": answer, "answer_id": number} for number, answer in enumerate(answers, 1)]
    rows = [
        {"image": "0.png", "question": "Which?", "answers": given, "question_id": 4} for given in (answers, official)
    ]
    convert(source(*rows), tmp_path / "out", images=pictures)
    for sample in Shards.open(tmp_path / "out"):
        (question,) = sample.questions
        assert list(question.answers) == answers and question.id == 4 and question.answer == "red"


def test_paths_start_beside_the_source_unless_told(source, pictures, tmp_path: Path) -> None:
    convert(source({"image": "pictures/0.png", "caption": "c"}), tmp_path / "beside")
    convert(source({"image": str(pictures / "0.png"), "caption": "c"}), tmp_path / "absolute")
    assert Shards.open(tmp_path / "beside")[0].images == Shards.open(tmp_path / "absolute")[0].images


def test_a_byte_order_mark_blank_lines_and_a_missing_last_newline_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    assert convert(tmp_path / "a.jsonl", tmp_path / "out").samples == 2
    assert [sample.text for sample in Shards.open(tmp_path / "out")] == ["a", "b"]


def test_converting_again_gives_the_same_bytes(source, pictures, tmp_path: Path) -> None:
    rows = source({"image": "0.png", "caption": "a"}, {"image": "1.jpg", "caption": "b"})
    for name in ("one", "two"):
        convert(rows, tmp_path / name, images=pictures)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


# On several cores, killed, and with faults among the samples


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_bytes_do_not_depend_on_the_number_of_processes(source, pictures, tmp_path: Path) -> None:
    rows = source(*[{"image": f"{n % 3}.{('png', 'jpg', 'webp')[n % 3]}", "caption": str(n)} for n in range(95)])
    for processes in (1, 2):
        engine = LocalEngine(processes)
        convert(rows, tmp_path / str(processes), images=pictures, samples_per_shard=10, engine=engine)
    assert written(tmp_path / "1") == written(tmp_path / "2") and len(written(tmp_path / "1")) == 11
    assert [sample.caption for sample in Shards.open(tmp_path / "2")] == [str(number) for number in range(95)]


def test_a_shard_is_no_larger_than_asked_for(source, tmp_path: Path) -> None:
    rows = source(*[{"text": "x" * 3000}] * 25)
    convert(rows, tmp_path / "out", samples_per_shard=10, shard_bytes=20_480)
    index = json.loads((tmp_path / "out" / "index.json").read_text())["shards"]
    assert [shard["file"] for shard in index][:4] == ["00000.tar", "00000-1.tar", "00001.tar", "00001-1.tar"]
    assert all(shard["bytes"] <= 20_480 for shard in index) and len(Shards.open(tmp_path / "out")) == 25


def test_samples_that_can_not_be_used_are_counted_and_named(source, pictures, tmp_path: Path) -> None:
    """One in a hundred: the others are converted, and each of these has its line."""
    good, bad = {"image": "0.png", "caption": "good"}, {"image": "cut.png", "caption": "bad"}
    (pictures / "cut.png").write_bytes((pictures / "0.png").read_bytes()[:-80])
    rows = source(*[bad if number % 100 == 37 else good for number in range(1200)])
    counts = convert(rows, tmp_path / "out", images=pictures, samples_per_shard=100, engine=LocalEngine(2))
    assert counts == Converted(samples=1188, skipped=12) and len(Shards.open(tmp_path / "out")) == 1188
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert len(reasons) == 12
    for number, reason in enumerate(reasons):
        assert reason.startswith(f"{rows} line {number * 100 + 38}: image ") and "truncated" in reason
    assert inspect(tmp_path / "out").faults == []


@pytest.mark.parametrize("count", [7, 5000])
def test_where_nothing_can_be_used_it_stops(count, source, pictures, tmp_path: Path) -> None:
    """And does not go through a million of them first."""
    rows = source(*[{"image": "no.png", "caption": "c"}] * count)
    with pytest.raises(UsageError) as refusal:
        convert(rows, tmp_path / "out", images=pictures)
    assert f"{min(count, 1000)} of {min(count, 1000)} samples can not be used, and 10% may" in str(refusal.value)
    assert left_in(tmp_path) == {"pairs.jsonl", "pictures"}


def test_more_may_be_skipped_when_told(source, tmp_path: Path) -> None:
    rows = source({"text": "good"}, b"bad")
    assert convert(rows, tmp_path / "out", max_skipped=0.5) == Converted(1, 1)


def test_a_mistake_in_the_program_is_no_skipped_sample(source, tmp_path: Path, monkeypatch) -> None:
    def mistaken(*_: object) -> None:
        raise TypeError("a mistake")

    monkeypatch.setattr("vlm.data_tools.convert.make_sample", mistaken)
    with pytest.raises(TypeError, match="a mistake"):
        convert(source(*[{"text": "t"}] * 30), tmp_path / "out", samples_per_shard=10, engine=LocalEngine(2))
    assert not (tmp_path / "out").exists()


def test_killed_and_started_again_it_goes_on(source, tmp_path: Path, monkeypatch) -> None:
    """Nothing is written twice, and the bytes are those of a run that nobody killed."""
    rows = source(*[{"text": str(number)} for number in range(60)])
    convert(rows, tmp_path / "straight", samples_per_shard=10)
    real, made = vlm.data_tools.convert.make_sample, []

    def dies(key: str, *rest: Any) -> Any:
        made.append(key)
        if len(made) == 35:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(key, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("vlm.data_tools.convert.make_sample", dies)
        arguments = {"src": rows, "out": tmp_path / "out", "samples_per_shard": 10, "engine": LocalEngine(1)}
        child = multiprocessing.get_context("fork").Process(target=convert, kwargs=arguments)
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL and not (tmp_path / "out").exists()
    monkeypatch.setattr("vlm.data_tools.convert.make_sample", lambda key, *rest: made.append(key) or real(key, *rest))
    assert convert(**arguments).samples == 60
    assert made == [f"{number:08d}" for number in range(31, 61)], "the first three shards were whole"
    assert written(tmp_path / "out") == written(tmp_path / "straight")


def test_a_source_that_has_changed_is_converted_anew(source, tmp_path: Path, monkeypatch) -> None:
    rows = source(*[{"text": "old"}] * 30)
    with monkeypatch.context() as patch:
        patch.setattr("vlm.data_tools.convert.write_index", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        child = multiprocessing.get_context("fork").Process(target=convert, args=(rows, tmp_path / "out"))
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL and (tmp_path / ".out.partial").is_dir()
    source(*[{"text": "new"}] * 30)
    convert(rows, tmp_path / "out")
    assert {sample.text for sample in Shards.open(tmp_path / "out")} == {"new"}


# What is refused


GOOD = {"text": "good"}
FAULTS = {
    "not JSON": (b"{caption: cat}", "not JSON (", "write one object a line"),
    "cut short": (b'{"text": "ca', "not JSON (", "write one object a line"),
    "not UTF-8": (b'{"text": "\xe9"}', "not JSON (", "in UTF-8"),
    "a bomb of brackets": (b"[" * 100_000, "not JSON (", "write one object a line"),
    "no object": (b"[1]", "a list", "write one object a line"),
    "both names": ({"image": "0.png", "images": ["0.png"], "text": "t"}, 'both "image" and "images"', "keep one"),
    "image is a number": ({"image": 3, "text": "t"}, "image paths are not strings", 'write "image": "a.png"'),
    "empty path": ({"image": "", "text": "t"}, "image paths are not strings", 'write "image": "a.png"'),
    "images is a word": ({"images": "0.png", "text": "t"}, "image paths are not strings", '"images": ["a.png", …]'),
    "missing image": ({"image": "no.png", "text": "t"}, "no.png: No such file", "check the path or give --images"),
    "a folder": ({"image": ".", "text": "t"}, "Is a directory", "check the path or give --images"),
    "a zero byte": ({"image": "a\0b", "text": "t"}, "null byte", "check the path or give --images"),
    "an address": ({"image": "https://example.org/a.png", "text": "t"}, "an address", "download them with img2dataset first"),
    "no picture": ({"image": "page.png", "text": "t"}, "image {images}/page.png: not a JPEG", "convert it to one"),
    "truncated": ({"image": "cut.png", "text": "t"}, "cut.png: damaged or truncated", "replace the file"),
    "empty file": ({"image": "empty.png", "text": "t"}, "empty.png: an empty file", "replace it"),
    "a bomb of pixels": (
        {"image": "bomb.png", "text": "t"},
        "bomb.png: 60000×50000 pixels, the limit is 64000000",
        "make it smaller",
    ),
    "empty question": ({"image": "0.png", "question": " ", "answer": "a"}, "question is empty", "fill it in"),
    "no answer": ({"image": "0.png", "question": "Why?", "answers": []}, "'Why?' has no answers", "at least one"),
    "image places": (
        {"messages": [{"role": "user", "content": [{"type": "image"}] * 2}], "image": "0.png"},
        "messages have 2 image places for 1 images",
        "add the images",
    ),
    "an image that no message shows": (
        {"messages": [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Yes."}], "image": "0.png"},
        "messages have 0 image places for 1 images",
        'write one {"type": "image"} for each image',
    ),
    "nothing": ({"licence": "CC0"}, "nothing usable", "give an image"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_with_its_place_and_leaves_nothing(fault, source, pictures, tmp_path: Path) -> None:
    line, says, mend = FAULTS[fault]
    good = (pictures / "0.png").read_bytes()
    (pictures / "page.png").write_bytes(b"<html>404</html>")
    (pictures / "cut.png").write_bytes(good[: len(good) // 2])
    (pictures / "empty.png").write_bytes(b"")
    header = b"IHDR" + (60000).to_bytes(4, "big") + (50000).to_bytes(4, "big") + good[24:29]
    (pictures / "bomb.png").write_bytes(good[:12] + header + zlib.crc32(header).to_bytes(4, "big") + good[33:])
    rows = source(GOOD, b"", line)
    before = left_in(tmp_path)
    with pytest.raises(UsageError) as refusal:
        convert(rows, tmp_path / "out", images=pictures)
    text = str(refusal.value)
    assert text.startswith(f"{rows} line 3: ") and "\n" not in text
    assert says.format(images=pictures) in text and mend in text
    assert left_in(tmp_path) == before


def test_what_is_asked_for_is_checked_first(source, tmp_path: Path) -> None:
    rows = source(GOOD)
    for arguments, says in (
        ({"format": "parquet"}, "format 'parquet' is not known; use one of jsonl"),
        ({"src": tmp_path / "no.jsonl"}, "no.jsonl: no such file; check the path"),
        ({"src": tmp_path}, f"{tmp_path}: no such file"),
        ({"images": tmp_path / "none"}, "none: no such folder; give the one that image paths start from"),
        ({"src": source(b"", b" ", name="empty.jsonl")}, "empty.jsonl: no samples; give one JSON object a line"),
        ({"samples_per_shard": 0}, "0 samples per shard; give at least 1"),
        ({"samples_per_shard": -1}, "-1 samples per shard; give at least 1"),
        ({"shard_bytes": 0}, "0 bytes per shard; give at least 1"),
        ({"max_skipped": -0.1}, "max_skipped is -0.1 of the samples; give 0 to 1"),
        ({"out": rows}, "pairs.jsonl: already there; choose another folder or remove it"),
        ({"out": rows / "in"}, "can not be written (Not a directory); choose another folder"),
    ):
        before = left_in(tmp_path)
        with pytest.raises(UsageError) as refusal:
            convert(**{"src": rows, "out": tmp_path / "out"} | arguments)
        assert says in str(refusal.value) and "\n" not in str(refusal.value)
        assert left_in(tmp_path) == before


def test_what_can_not_be_read_is_named(source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    rows = source({"image": "0.png", "text": "t"})
    (tmp_path / "0.png").mkdir()
    with pytest.raises(UsageError, match="line 1: image .*0.png: Is a directory; check the path"):
        convert(rows, tmp_path / "out")
    monkeypatch.setattr("vlm.data_tools.sources.jsonl.open", denied, raising=False)
    with pytest.raises(UsageError, match="pairs.jsonl: can not be read .Permission denied.; check its permissions"):
        convert(rows, tmp_path / "out")


def test_an_earlier_set_is_not_written_over(source, tmp_path: Path) -> None:
    convert(source(GOOD), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UsageError, match="out: already there"):
        convert(source(GOOD, GOOD), tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("place", ["vlm.shards.ShardFileWriter.write", "vlm.data_tools.convert.write_index"])
def test_a_disk_that_runs_full_leaves_nothing(place, source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While samples are written, or the index."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    rows = source(*[GOOD] * 5)
    monkeypatch.setattr(place, full)
    with pytest.raises(RunError) as failure:
        convert(rows, tmp_path / "out")
    assert str(failure.value) == f"{tmp_path}/out: no space left on the disk; free some and run it again"
    assert left_in(tmp_path) == {"pairs.jsonl"}


def test_killed_half_way_it_leaves_nothing_that_looks_whole(source, tmp_path: Path, monkeypatch) -> None:
    real, seen = vlm.data_tools.convert.make_sample, []

    def dies(key: str, *rest: Any) -> Any:
        seen.append(key)
        if len(seen) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(key, *rest)

    rows = source(*[GOOD] * 9)
    with monkeypatch.context() as patch:
        patch.setattr("vlm.data_tools.convert.make_sample", dies)
        child = multiprocessing.get_context("fork").Process(target=convert, args=(rows, tmp_path / "out"))
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("index.json"))
    assert all(name == "pairs.jsonl" or name.startswith(".out.") for name in left_in(tmp_path))
    assert convert(rows, tmp_path / "out").samples == 9, "what it left is in nobody's way"
