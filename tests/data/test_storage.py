"""Folders near and far: a file is whole or not there, what is not ours is left alone, every error is one line."""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from vlm.errors import RunError, UsageError
from vlm.storage import Folder, cache_folder, fetched, is_address, join, reached, verify

FAR = "memory://bucket/data"


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of its own, and nothing in memory."""
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    yield
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]


@pytest.fixture(params=["near", "far"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return Folder(tmp_path / "folder" if request.param == "near" else FAR)


def put(folder: Folder, name: str, data: bytes = b"data") -> None:
    with folder.write(name) as file:
        file.write(data)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_places_are_joined() -> None:
    assert join("s3://bucket/", "a") == "s3://bucket/a" and join(Path("a"), "b") == "a/b"
    assert is_address("hf://datasets/a/b") and not is_address("/a:b/c") and not is_address(Path("a"))


def test_bytes_go_round(folder: Folder) -> None:
    assert folder.read("a.bin") is None and folder.names() == []
    for data in (b"", b"first", bytes(range(256)) * 8192):
        put(folder, "a.bin", data)
        assert folder.read("a.bin") == data
    put(folder, "in/b.bin")
    assert folder.names() == ["a.bin", "in"] and Folder(join(folder.place, "in")).names() == ["b.bin"]
    assert pickle.loads(pickle.dumps(folder)).read("in/b.bin") == b"data"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x")])
def test_a_file_whose_writing_broke_off_is_not_there(folder: Folder, error: BaseException) -> None:
    put(folder, "old", b"old")
    for name in ("old", "new"):
        with pytest.raises(type(error)), folder.write(name) as file:
            file.write(b"half")
            raise error
    assert folder.read("old") == b"old" and folder.read("new") is None and folder.names() == ["old"]


def test_what_somebody_was_killed_in_the_middle_of_has_no_name(tmp_path: Path) -> None:
    (tmp_path / ".a.jsonl.x8d").write_bytes(b"half")
    assert Folder(tmp_path).names() == []


def test_removing(folder: Folder) -> None:
    for name in ("a", "in/b", "in/c", "in/deep/d", "inner"):
        put(folder, name)
    folder.remove("none")
    folder.remove("a")
    folder.remove("in")
    assert folder.names() == ["inner"]
    folder.remove()
    folder.remove()
    assert folder.names() == [] and folder.read("inner") is None


def test_a_bucket_is_emptied_and_stays() -> None:
    put(Folder("memory://bucket"), "a")
    Folder("memory://bucket").remove()
    assert fsspec.filesystem("memory").isdir("/bucket") and Folder("memory://bucket").names() == []


def test_a_full_disk_on_the_way_is_one_line() -> None:
    with pytest.raises(RunError, match="no space left on the disk; free some"), Folder(FAR).write("a"):
        raise OSError(28, "No space left on device")
    assert Folder(FAR).names() == []


def test_a_copy_is_fetched_once_and_kept_by_its_bytes() -> None:
    put(Folder(FAR), "a.tar", b"one")
    copy = fetched(f"{FAR}/a.tar", sha256(b"one"))
    assert copy.read_bytes() == b"one" and copy.is_relative_to(cache_folder()) and copy.suffix == ".tar"
    Folder(FAR).remove()
    assert fetched(f"{FAR}/a.tar", sha256(b"one")) == copy


def test_other_bytes_than_promised_are_refused_and_not_kept() -> None:
    put(Folder(FAR), "a.tar", b"flipped")
    with pytest.raises(UsageError, match=f"^{FAR}/a.tar: sha256 .*…, the index says .*…; bytes have changed"):
        fetched(f"{FAR}/a.tar", sha256(b"right"))
    assert not list(cache_folder().rglob("*.tar"))


def test_a_damaged_copy_is_fetched_anew() -> None:
    put(Folder(FAR), "a.tar", b"right")
    copy = fetched(f"{FAR}/a.tar", sha256(b"right"))
    copy.write_bytes(b"wrong")
    assert fetched(f"{FAR}/a.tar", sha256(b"right")).read_bytes() == b"right"


def test_without_a_sum_what_has_changed_is_another_file() -> None:
    put(Folder(FAR), "a.tar", b"one")
    one = fetched(f"{FAR}/a.tar")
    assert fetched(f"{FAR}/a.tar") == one
    put(Folder(FAR), "a.tar", b"another")
    assert fetched(f"{FAR}/a.tar").read_bytes() == b"another" and one.read_bytes() == b"one"


def test_a_verified_file_is_read_once_and_again_when_it_changed(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"right")
    verify(path, sha256(b"right"))
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", None)
        verify(path, sha256(b"right"))
    path.write_bytes(b"wrong")
    os.utime(path, (1, 1))
    with pytest.raises(UsageError, match="a.tar: sha256 .* bytes have changed, copy or convert it again"):
        verify(path, sha256(b"right"))


def test_a_cache_that_can_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "file" / "cache"))
    put(Folder(FAR), "a.tar", b"one")
    with pytest.raises(UsageError, match="file/cache/shards: can not be written .*; set VLM_CACHE to another"):
        fetched(f"{FAR}/a.tar", sha256(b"one"))
    (tmp_path / "a.tar").write_bytes(b"one")
    verify(tmp_path / "a.tar", sha256(b"one"))


def test_what_can_not_be_reached_is_recalled(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: object) -> None:
        raise ConnectionError("no route")

    put(Folder(FAR), "index.json", b"{}")
    assert Folder(FAR).read_or_recall("index.json") == b"{}" and Folder(FAR).read_or_recall("none") is None
    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "cat_file", cut)
    with pytest.warns(UserWarning, match="data/index.json: cannot be reached .no route.*; going on with the copy of"):
        assert Folder(FAR).read_or_recall("index.json") == b"{}"
    with pytest.raises(RunError, match="data/none: cannot be reached"):
        Folder(FAR).read_or_recall("none")


def test_a_place_that_can_not_be_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UsageError, match="^s4://bucket/a: no storage is called s4; use s3://, gs://, hf:// or https://$"
    ):
        Folder("s4://bucket").read("a")
    with pytest.raises(UsageError, match="^memory://bucket/data/a.tar: nothing is there; check the address$"):
        fetched(f"{FAR}/a.tar")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    line = "^gs://bucket/a: a package is missing .*install gcsfs.*; pip install 'vlm\\[remote\\]'$"
    with pytest.raises(UsageError, match=line) as refusal:
        Folder("gs://bucket").read("a")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("place", ["hf://datasets/some/data/train", "https://example.org/data", "s3://bucket/data"])
def test_storages_are_known_without_a_network(place: str) -> None:
    protocol = place.partition("://")[0]
    with reached(place) as (filesystem, path):
        assert protocol in filesystem.protocol and path.endswith("data/train" if protocol == "hf" else "data")
