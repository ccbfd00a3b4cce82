"""`vlm data inspect`: every fault is found and named beside the others, and a fault is exit code 1."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from shard_files import fields, png, write_set, write_tar

from vlm.cli import run
from vlm.data_tools import inspect as inspection
from vlm.data_tools.engines import LocalEngine
from vlm.data_tools.inspect import inspect
from vlm.errors import UsageError
from vlm.shards import ShardWriter


def flip(tar: Path, place: int) -> None:
    data = bytearray(tar.read_bytes())
    data[place] ^= 0x40
    tar.write_bytes(data)


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
    assert len(report.faults) == len(said) and report.samples == 6 and report.words["text"].places == {5: 1}
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


def test_processes_find_what_one_finds(tmp_path: Path, shards: Path) -> None:
    append_bad_samples(shards)
    shutil.copy(shards.parent / "bad" / "00000.tar", shards / "00002.tar")
    shutil.copy(shards / "00000.tar", shards / "00003.tar")
    (shards / "index.json").unlink()
    alone = inspect(shards)
    assert alone == inspect(shards, map=LocalEngine(2).map) and alone.fault_count == len(alone.faults) == 8


def test_faults_beyond_a_thousand_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    report = inspect(write_set(tmp_path / "set", {f"{n}": {"txt": b"\xff" + b"x" * 99} for n in range(1201)}, 400))
    assert report.fault_count == 1201 and len(report.faults) == 1000 and dict(report.rows())["faults"] == "1,201"


def test_keys_in_several_shards_are_named_with_the_shard_before(tmp_path: Path) -> None:
    for number, keys in enumerate(("abc", "dbe", "fgb", "ca")):
        write_tar(tmp_path / f"{number}.tar", {f"{key}.txt": b"words" for key in keys})
    assert inspect(tmp_path / "{0..3}.tar").faults == [
        f"{tmp_path}/{here}.tar: key {key} is in {tmp_path}/{there}.tar too"
        for here, key, there in ((1, "b", 0), (2, "b", 1), (3, "c", 0), (3, "a", 0))
    ]


def test_more_repeated_keys_than_are_kept_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "KEPT_FAULTS", 5)
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", {f"{key}.txt": b"words" for key in range(4)} | {f"x{number}": b""})
    report = inspect(tmp_path / "{0..2}.tar")
    assert report.fault_count == 3 + 2 * 3 and len(report.faults) == 5
    assert [" is in " in fault for fault in report.faults] == [False] * 3 + [True] * 2


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
