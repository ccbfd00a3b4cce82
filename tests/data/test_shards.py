"""Shards: bytes go round, nothing half-written stays, hostile and damaged tars are refused by name."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import random
import tarfile
from pathlib import Path

import pytest
import webdataset

from vlm.errors import RunError, UsageError
from vlm.files import room_for
from vlm.shards import AT_ONCE, COPIED, ShardFileWriter, Shards, ShardWriter, new_folder, scan, tar_header

PARTS = {"json": b'{"caption": "c"}'}


def write(out: Path, samples: dict[str, dict[str, bytes]], **options: int) -> Path:
    with ShardWriter(out, **options) as writer:  # type: ignore[arg-type]
        for key, parts in samples.items():
            writer.write(key, parts)
    return out


def tar_of(path: Path, *names: str, kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            member.size = len(PARTS["json"]) if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(PARTS["json"]))
    return path


def test_bytes_go_round(tmp_path: Path) -> None:
    rng = random.Random(0)
    samples = {
        f"{'deep/' * (number % 3)}{'ü' * (number % 60)}{number:05d}": {
            **{f"{image}.png": rng.randbytes(rng.randrange(2000)) for image in range(number % 4)},
            "json": json.dumps({"caption": f"picture {number}"}).encode(),
        }
        for number in range(57)
    }
    shards = Shards.open(write(tmp_path / "s", samples, samples_per_shard=10))
    assert len(shards) == 57 and shards.keys == list(samples)
    for number in rng.sample(range(57), 57):
        entry = shards.entries[number]
        assert entry.read() == samples[entry.key]
        assert shards[number].caption == f"picture {number}"
        assert len(shards[number].images) == number % 4


def test_index_says_what_is_there(tmp_path: Path) -> None:
    out = write(tmp_path / "s", {str(number): PARTS for number in range(25)}, samples_per_shard=10)
    index = json.loads((out / "index.json").read_text())
    assert index["samples"] == 25 and [shard["samples"] for shard in index["shards"]] == [10, 10, 5]
    for shard in index["shards"]:
        data = (out / shard["file"]).read_bytes()
        assert len(data) == shard["bytes"] and hashlib.sha256(data).hexdigest() == shard["sha256"]


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = (write(tmp_path / name, {"a": PARTS, "b": PARTS}) for name in "xy")
    assert all((one / file.name).read_bytes() == file.read_bytes() for file in two.iterdir())


def test_webdataset_reads_what_we_write(tmp_path: Path) -> None:
    samples = {f"{number:03d}": {"0.png": b"a", "1.png": b"b", **PARTS} for number in range(5)}
    out = write(tmp_path / "s", samples)
    theirs = list(webdataset.WebDataset(str(out / "00000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in theirs] == list(samples)
    assert all({name: sample[name] for name in ("0.png", "1.png", "json")} == samples["000"] for sample in theirs)


def test_braces_single_tars_and_lists(tmp_path: Path) -> None:
    out = write(tmp_path / "s", {str(number): PARTS for number in range(25)}, samples_per_shard=10)
    assert len(Shards.open(str(out / "{00000..00001}.tar"))) == 20
    assert len(Shards.open(out / "00002.tar")) == 5
    assert len(Shards.open([out, out / "00002.tar"])) == 30


def test_open_shards_travel_to_other_processes(tmp_path: Path) -> None:
    shards = Shards.open(write(tmp_path / "s", {"a": PARTS}))
    assert pickle.loads(pickle.dumps(shards))[0] == shards[0]


@pytest.mark.parametrize("key", ["img.v1", "", "a/", "a.b/c"])
def test_keys_that_merge_samples_are_not_written(tmp_path: Path, key: str) -> None:
    with pytest.raises(UsageError, match="empty or has dots"):
        write(tmp_path / "s", {key: PARTS})
    assert list(tmp_path.iterdir()) == []


def test_a_key_is_not_written_twice(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'a' comes twice"), ShardWriter(tmp_path / "s") as writer:
        writer.write("a", PARTS)
        writer.write("a", PARTS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x")])
def test_nothing_stays_of_a_writing_that_failed(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), ShardWriter(tmp_path / "s", samples_per_shard=1) as writer:
        writer.write("a", PARTS)
        writer.write("b", PARTS)
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="s: no space left on the disk"), room_for("s"), ShardWriter(tmp_path / "s"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="already there"), new_folder(tmp_path):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="can not be written"), ShardWriter(tmp_path / "file" / "s"):
        pass


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("img.v1.png", "img.v2.png"), "img.v1.png has dots in its key"),
        (("a.json", "b.json", "a.png"), "key a comes twice"),
        (("a.json", "a.json"), "a.json comes twice"),
        (("a.json", "README"), "README has no key or no extension"),
        ((".hidden",), "no key or no extension"),
    ],
)
def test_tars_that_would_merge_or_split_samples_are_refused(tmp_path: Path, names: tuple[str, ...], says: str) -> None:
    path = tar_of(tmp_path / "bad.tar", *names)
    with pytest.raises(UsageError) as caught:
        Shards.open(path)
    assert says in str(caught.value) and "bad.tar" in str(caught.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_links_and_devices_are_no_samples(tmp_path: Path, kind: bytes) -> None:
    with pytest.raises(UsageError, match="no samples"):
        Shards.open(tar_of(tmp_path / "a.tar", "a.json", kind=kind))


def test_names_that_climb_out_are_only_names(tmp_path: Path) -> None:
    shards = Shards.open(tar_of(tmp_path / "a.tar", "../../etc/a.json", "/b.json"))
    assert [shards[0].caption, shards[1].caption] == ["c", "c"] and len(list(tmp_path.iterdir())) == 1


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    out = write(tmp_path / "s", {str(number): PARTS for number in range(3)})
    data = (out / "00000.tar").read_bytes()
    cut = tmp_path / "cut.tar"
    for length in range(0, 3 * 1024 + 1, 128):
        cut.write_bytes(data[:length])
        with pytest.raises(UsageError, match="cut.tar: (truncated|not an uncompressed tar)"):
            list(scan(cut))
    cut.write_bytes(data[: 3 * 1024 + 512])
    assert len(list(scan(cut))) == 3


def test_a_compressed_tar_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.json"))
    with pytest.raises(UsageError, match="not an uncompressed tar"):
        Shards.open(tmp_path / "a.tar")


def test_a_folder_must_be_as_its_index_says(tmp_path: Path) -> None:
    out = write(tmp_path / "s", {str(number): PARTS for number in range(3)}, samples_per_shard=1)
    (out / "extra.tar").write_bytes(b"")
    with pytest.raises(UsageError, match="extra.tar is not in index.json"):
        Shards.open(out)
    (out / "extra.tar").unlink()
    (out / "00001.tar").write_bytes((out / "00001.tar").read_bytes()[:-512])
    with pytest.raises(UsageError, match="00001.tar: 9728 bytes, index.json says 10240 bytes.*vlm data inspect"):
        Shards.open(out)
    (out / "00001.tar").unlink()
    with pytest.raises(UsageError, match="00001.tar: missing"):
        Shards.open(out)


@pytest.mark.parametrize("index", ["{", "[]", '{"shards": [{}]}', '{"shards": [1]}', "[" * 100_000])
def test_an_index_that_can_not_be_read_is_named(tmp_path: Path, index: str) -> None:
    (tmp_path / "index.json").write_text(index)
    with pytest.raises(UsageError, match="index.json: can not be read"):
        Shards.open(tmp_path)


def test_an_index_does_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    shard = {"file": "../other.tar", "samples": 1, "bytes": 1, "sha256": ""}
    (tmp_path / "index.json").write_text(json.dumps({"shards": [shard]}))
    with pytest.raises(UsageError, match="not in the folder"):
        Shards.open(tmp_path)


def test_missing_sources_name_the_mend(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no index.json"):
        Shards.open(tmp_path)
    with pytest.raises(UsageError, match="nothing.tar: no such shard"):
        Shards.open(tmp_path / "nothing.tar")
    tar_of(tmp_path / "a-0.tar", "a.json")
    with pytest.raises(UsageError, match="a-1.tar: no such shard"):
        Shards.open(tmp_path / "a-{0..1}.tar")


def test_a_shard_that_shrinks_while_open_is_a_failed_run(tmp_path: Path) -> None:
    shards = Shards.open(write(tmp_path / "s", {"a": PARTS}))
    (tmp_path / "s" / "00000.tar").write_bytes(b"")
    with pytest.raises(RunError, match="shorter than when it was opened"):
        shards[0]
    (tmp_path / "s" / "00000.tar").unlink()
    with pytest.raises(RunError, match="No such file"):
        shards[0]


@pytest.mark.parametrize("name", ["00001.jpg", "a/b.0.png", "x" * 96 + ".jpg", "x" * 97 + ".jpg", "ü.json", "%d.txt"])
@pytest.mark.parametrize("size", [0, 7, 8, 51_205, 8**11 - 1, 8**11])
def test_a_header_is_the_one_that_tarfile_makes(name: str, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    assert tar_header(name, size) == member.tobuf(tarfile.PAX_FORMAT)


def test_large_and_small_files_side_by_side_are_those_of_tarfile(tmp_path: Path) -> None:
    """Blocks that are copied together and blocks that are not, of a shard that is written in several goes."""
    rng = random.Random(0)
    sizes = [0, 1, 511, 512, 513, COPIED - 1, COPIED, COPIED + 1, AT_ONCE - 1, AT_ONCE, AT_ONCE + 1, 9 * AT_ONCE]
    samples = {
        f"{number:05d}": {"jpg": rng.randbytes(rng.choice(sizes)), "json": rng.randbytes(rng.randrange(99))}
        for number in range(60)
    }
    out = write(tmp_path / "s", samples)
    with tarfile.open(tmp_path / "theirs.tar", "w") as archive:
        for key, parts in samples.items():
            for extension, data in parts.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    ours = (out / "00000.tar").read_bytes()
    assert ours == (tmp_path / "theirs.tar").read_bytes()
    (listed,) = json.loads((out / "index.json").read_text())["shards"]
    assert (listed["bytes"], listed["sha256"]) == (len(ours), hashlib.sha256(ours).hexdigest())


def test_samples_are_not_held_back_without_end(tmp_path: Path) -> None:
    with open(tmp_path / "a.tar", "wb") as file:
        writer = ShardFileWriter(file, "a.tar")
        for number in range(100):
            writer.write(str(number), {"jpg": bytes(100_000)})
            assert writer.bytes - os.fstat(file.fileno()).st_size < AT_ONCE
    assert writer.bytes > 9 * AT_ONCE


def test_a_disk_that_takes_no_more_is_an_error_of_the_writer() -> None:
    with open("/dev/full", "wb") as file:
        writer = ShardFileWriter(file, "a.tar")
        with pytest.raises(OSError, match="No space left"):
            writer.write("a", {"jpg": bytes(AT_ONCE)})
        writer = ShardFileWriter(file, "a.tar")
        writer.write("a", PARTS)
        with pytest.raises(OSError, match="No space left"):
            writer.close()
