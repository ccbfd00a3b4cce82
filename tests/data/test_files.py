"""Files and folders that appear whole or not at all, and errors of the disk that name what was being written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vlm.files import atomic_folder, atomic_write, start_storing, write_blocks


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing reaches the disk any more; as a real write it names no file."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlm.files.os.fsync", full)


def test_a_file_is_there_when_the_block_ended_well(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "new" / "a.txt", "w") as file:
        file.write("ü")
        assert not (tmp_path / "new" / "a.txt").exists()
    assert (tmp_path / "new" / "a.txt").read_text("utf-8") == "ü"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError(5, "Input/output error")])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(type(error) if isinstance(error, OSError) else error), atomic_write(tmp_path / "a", "w") as file:
        file.write("new")
        raise error
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("old")
    with pytest.raises(ValueError), atomic_folder(tmp_path / "a") as fresh:
        (fresh / "new").write_text("new")
        raise ValueError
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "old"]


def test_a_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with atomic_folder(tmp_path / "a") as fresh:
            (fresh / name).write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "new"]


def test_a_full_disk_is_told_of_the_file_that_was_asked_for(tmp_path: Path, full_disk: None, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path / "a.json", Path("a.json")):
        with pytest.raises(OSError) as caught, atomic_write(place) as file:
            file.write(b"{}")
        assert caught.value.filename == str(place)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_of_the_folder_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, atomic_folder(tmp_path / "model"):
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(tmp_path / "model")
    with pytest.raises(OSError) as caught, atomic_folder(tmp_path / "model") as fresh:
        (fresh / "missing" / "weights").write_bytes(b"")
    assert caught.value.filename == str(tmp_path / "model")


def test_another_files_error_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, atomic_folder(tmp_path / "a"):
        (tmp_path / "source.png").read_bytes()
    assert caught.value.filename == str(tmp_path / "source.png")


def test_whoever_may_read_new_files_may_read_these(tmp_path: Path) -> None:
    """Temporary files are made for one user alone."""
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "file") as file:
            file.write(b"")
        with atomic_folder(tmp_path / "folder") as fresh:
            (fresh / "deep").mkdir()
            for place in (fresh, fresh / "deep"):
                (place / "model.safetensors").touch(mode=0o600)
    finally:
        os.umask(before)
    modes = {str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    files = ("file", "folder/model.safetensors", "folder/deep/model.safetensors")
    assert modes == {"folder": 0o750, "folder/deep": 0o750} | dict.fromkeys(files, 0o640)


@pytest.mark.parametrize("most", [1, 3, 10_000])
def test_blocks_are_written_whole_however_little_a_call_takes(tmp_path: Path, monkeypatch, most: int) -> None:
    def short(handle: int, blocks: list[bytes]) -> int:
        assert len(blocks) <= 1024
        return os.write(handle, b"".join(blocks)[:most])

    blocks = [b"", b"abc", b"d", b"", b"efghi"] * 300
    with open(tmp_path / "a", "wb") as file:
        write_blocks(file, blocks)
        monkeypatch.setattr("vlm.files.os.writev", short)
        write_blocks(file, blocks)
    assert (tmp_path / "a").read_bytes() == b"".join(blocks) * 2


def test_a_disk_can_be_told_to_begin(tmp_path: Path, monkeypatch) -> None:
    """Advice changes no byte, and no system need have it."""
    with open(tmp_path / "a", "wb") as file:
        file.write(b"abc")
        file.flush()
        start_storing(file, 0, 3)
        monkeypatch.setattr("vlm.files._C", None)
        start_storing(file, 0, 3)
    assert (tmp_path / "a").read_bytes() == b"abc"
