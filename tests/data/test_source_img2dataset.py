"""What img2dataset leaves, read by `vlm data convert`: tars cut and damaged anywhere, hostile members, every fault."""

from __future__ import annotations

import itertools
import os
import pickle
import sys
import tarfile
from pathlib import Path

import pytest
from source_files import bytes_of, crawl, encoded, pair, says, tar_of

from vlm.errors import UsageError


def as_files(tar: Path) -> None:
    """The shard in the other layout, a folder of files."""
    with tarfile.open(tar) as opened:
        opened.extractall(tar.with_suffix(""), filter="data")
    tar.unlink()


@pytest.mark.parametrize("files", [False, True])
@pytest.mark.parametrize("tells", [False, True])
@pytest.mark.parametrize("caption", [False, True])
def test_img2dataset_output(files, tells, caption, read, tmp_path):
    """In both layouts; with a caption beside the picture or in the parquet file alone; with the parquet file alone."""
    for shard in range(3):
        tar = crawl(tmp_path / "crawl", shard, tells=tells, caption=caption)
        as_files(tar) if files else None
    records, skipped = read("img2dataset", tmp_path / "crawl")
    assert [record.fields["caption"] for record in records] == [
        f"caption {n} of {s}" for s in range(3) for n in range(5)
    ]
    assert [bytes_of(record) for record in records] == [[encoded(100 * s + n)] for s in range(3) for n in range(5)]
    assert records[7].fields["url"] == "http://x/2" and records[7].fields["key"] == "000010002"
    assert records[7].key == "00001-000010002"
    reason = "HTTP Error 404: Not Found" if tells else "failed_to_download"
    assert [one.reason.partition("crawl/")[2].replace(".tar", "") for one in skipped] == [
        f"0000{shard}: 2 of 7 addresses were not downloaded; {reason}: 2" for shard in range(3)
    ]
    assert all(one.samples == 0 for one in skipped)


def test_img2dataset_keys_may_come_again_in_another_shard(read, tmp_path):
    for shard in range(2):
        crawl(tmp_path / "crawl", 0).rename(tmp_path / "crawl" / f"{shard}-part.tar")
    assert [record.key for record in read("img2dataset", tmp_path / "crawl")[0]] == [
        f"0000{shard}-00000000{number}" for shard in range(2) for number in range(5)
    ]


@pytest.mark.parametrize("tells", ["stats", "parquet", "nothing"])
def test_a_tar_cut_anywhere_gives_whole_pairs_and_names_the_loss(tells, read, tmp_path):
    tar = crawl(tmp_path / "crawl", 0, tells=tells == "stats")
    crawl(tmp_path / "crawl", 1, 2, 0)
    if tells == "nothing":
        (tmp_path / "crawl" / "00000.parquet").unlink()
    whole = tar.read_bytes()
    with tarfile.open(tar) as opened:
        ends = [m.offset_data + -(-m.size // 512) * 512 for m in opened if m.name.endswith(".txt")]
    for length in range(0, len(whole), 512):
        tar.write_bytes(whole[:length])
        records, skipped = read("img2dataset", tmp_path / "crawl")
        complete = sum(end <= length for end in ends)
        pairs = [(record.fields["caption"], bytes_of(record)) for record in records]
        expected = [(f"caption {n} of 0", [encoded(n)]) for n in range(complete)]
        assert pairs == expected + [(f"caption {n} of 1", [encoded(100 + n)]) for n in range(2)]
        if length < ends[-1] + 512:
            loss = skipped[0]
            assert loss.samples == (5 - complete if tells != "nothing" else 1)
            last = f"00000000{complete - 1}" if complete else "no sample"
            lost = (
                f"{5 - complete} samples are lost" if tells != "nothing" else "how many samples are lost is not known"
            )
            assert loss.reason == f"{tar}: truncated at {length} bytes, after {last}; {lost}; download it again"
        else:
            assert sum(one.samples for one in skipped) == 0


def test_a_tar_cut_within_a_block_too(read, tmp_path):
    tar = crawl(tmp_path / "crawl", 0, 2)
    whole = tar.read_bytes()
    for length in range(1, 6000, 37):
        tar.write_bytes(whole[:length])
        for record in read("img2dataset", tmp_path / "crawl")[0]:
            number = int(record.fields["key"])
            assert (record.fields["caption"], bytes_of(record)) == (f"caption {number} of 0", [encoded(number)])


def test_a_damaged_header_ends_the_tar_and_is_named(read, tmp_path):
    tar = crawl(tmp_path / "crawl", 0)
    with tarfile.open(tar) as opened:
        place = opened.getmember("000000002.jpg").offset
    data = bytearray(tar.read_bytes())
    data[place + 3] ^= 1
    tar.write_bytes(data)
    records, skipped = read("img2dataset", tmp_path / "crawl")
    assert [record.fields["key"] for record in records] == ["000000000", "000000001"]
    assert skipped[0].samples == 3
    assert f"00000.tar: not an uncompressed tar (invalid header at byte {place})" in skipped[0].reason
    assert skipped[0].reason.endswith(", after 000000001; 3 samples are lost; download it again")


def test_a_header_damaged_in_any_byte_mispairs_nothing(read, tmp_path):
    tar = crawl(tmp_path / "crawl", 0, 3)
    with tarfile.open(tar) as opened:
        member = opened.getmember("000000001.jpg")
    whole = tar.read_bytes()
    for place in range(member.offset, member.offset_data):
        for mask in (0x01, 0x08, 0xFF):
            tar.write_bytes(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
            records, skipped = read("img2dataset", tmp_path / "crawl")
            pairs = {(record.fields["caption"], *bytes_of(record)) for record in records}
            assert pairs <= {(f"caption {number} of 0", encoded(number)) for number in range(3)}
            assert len(records) + sum(one.samples for one in skipped) == 3


def test_the_last_pair_before_a_cut_is_used_only_if_nothing_can_be_missing(read, tmp_path):
    """A picture and its JSON: the .txt may have been cut off."""
    tar = crawl(tmp_path / "crawl", 0)
    with tarfile.open(tar) as opened:
        text = opened.getmember("000000004.txt")
    tar.write_bytes(tar.read_bytes()[: text.offset])
    records, skipped = read("img2dataset", tmp_path / "crawl")
    assert len(records) == 4 and skipped[0].samples == 1


def test_a_whole_tar_that_lacks_samples_is_named(read, tmp_path):
    crawl(tmp_path / "crawl", 0, 7)
    (tmp_path / "crawl" / "00000.tar").rename(tmp_path / "seven")
    crawl(tmp_path / "crawl", 0, 5)
    stats = tmp_path / "crawl" / "00000_stats.json"
    stats.write_text(stats.read_text().replace('"successes": 5', '"successes": 7'))
    records, skipped = read("img2dataset", tmp_path / "crawl")
    assert len(records) == 5 and skipped[0].samples == 2
    assert skipped[0].reason.endswith("00000.tar: 5 samples, 00000_stats.json tells of 7; download it again")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("executed",)


HOSTILE: dict[str, tuple[list[tuple[str, bytes | str]], list[str]]] = {
    "above": (pair("../x"), ["'../x' is no name for a member"]),
    "above, within": (pair("a/../../x"), ["'a/../../x' is no name for a member"]),
    "absolute": (pair("/etc/x"), ["'/etc/x' is no name for a member"]),
    "two lines": (pair("a\nb"), ["'a\\nb' is no name for a member"]),
    "not UTF-8": (pair("a\udcff"), ["'a\\udcff' is no name for a member"]),
    "no name": (pair("a/"), ["'a/' is no name for a member"]),
    "dots": (pair("img.v1", 1) + pair("img.v2", 2), ["key 'img.v1' has dots", "key 'img.v2' has dots"]),
    "numbers": ([("i.0.jpg", encoded(0)), ("i.1.jpg", encoded(1))], ["key 'i.0' has dots", "key 'i.1' has dots"]),
    "dots of a folder": (pair("a.b/x"), ["key 'a.b/x' has dots"]),
    "a key again": (pair("x", 1, "one") + pair("y") + pair("x", 2, "two"), ["key 'x' comes twice"]),
    "a part again": (pair("x", 1, "one") + pair("x", 2, "two"), ["x.jpg comes 2 times"]),
    "a part again, larger": ([*pair("x"), ("x.JPG", encoded(2))], ["x.jpg comes 2 times"]),
    "two pictures": ([*pair("x"), ("x.png", encoded(2, "PNG"))], ["x: 2 pictures among its parts jpg, txt, png"]),
    "a link": ([("x.jpg", "> /etc/passwd"), ("x.txt", b"c")], ["x: 0 pictures among its parts txt"]),
    "a hard link": ([("x.jpg", "= good.jpg"), ("x.txt", b"c")], ["x: 0 pictures among its parts txt"]),
    "a pipe": ([("x.jpg", "pipe"), ("x.txt", b"c")], ["x: 0 pictures among its parts txt"]),
    "a device": ([("x.jpg", "device"), ("x.txt", b"c")], ["x: 0 pictures among its parts txt"]),
    "a folder": ([("x.jpg", "folder"), ("x.txt", b"c")], ["x: 0 pictures among its parts txt"]),
    "programs": (
        [("x.pickle", pickle.dumps(Bomb())), ("y.pth", pickle.dumps(Bomb())), ("z", b"")],
        ["3 members that are no picture, .txt or .json, the first 'x.pickle'"],
    ),
    "no caption": ([("x.jpg", encoded(0))], ["x: a picture without caption, question or text; fill one in"]),
    "empty caption": (pair("x", 0, " \n"), ["x: a picture without caption, question or text; fill one in"]),
    "no JSON": ([*pair("x"), ("x.json", b"{")], ["x: .json can not be read ("]),
    "JSON of a list": ([*pair("x"), ("x.json", b"[]")], ["x: .json holds a list; write one JSON object"]),
    "a bomb of brackets": ([*pair("x"), ("x.json", b"[" * 10**5)], ["x: .json can not be read ("]),
    "caption not UTF-8": ([("x.jpg", encoded(0)), ("x.txt", b"\xff")], ["x: .txt is not UTF-8 at byte 0"]),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_member_is_named_and_does_nothing(kind, read, tmp_path, monkeypatch):
    members, reasons = HOSTILE[kind]
    path = tar_of(tmp_path / "crawl" / "00000.tar", [*pair("good", 3, "before"), *members, *pair("last", 4, "after")])
    monkeypatch.chdir(tmp_path / "crawl")
    before = sorted(tmp_path.rglob("*"))
    records, skipped = read("img2dataset", tmp_path / "crawl")
    assert [record for record in sorted(tmp_path.rglob("*")) if "scratch" not in str(record)] == before
    found = {record.fields["key"]: (record.fields["caption"], bytes_of(record)) for record in records}
    assert found.pop("good") == ("before", [encoded(3)]) and found.pop("last") == ("after", [encoded(4)])
    again = {"x": ("one", [encoded(1)]), "y": ("c", [encoded(0)])}
    assert found == (again if kind == "a key again" else {})
    assert len(skipped) == len(reasons)
    for one, reason in zip(skipped, reasons, strict=True):
        assert one.reason.startswith(str(path)) and reason in one.reason
        assert one.samples == (0 if kind == "programs" else 1)


def test_a_file_with_holes_does_not_swallow_what_follows(read, tmp_path):
    """A sparse member says a size that is not that of what is stored; here, of the next pair too."""
    folder = tmp_path / "crawl"
    inner = tar_of(folder / "inner", pair("y", 2, "of y")).read_bytes()[:-1024].rstrip(b"\0")
    inner += bytes(-len(inner) % 512)
    image = encoded(1) + bytes(-len(encoded(1)) % 512)
    header = tarfile.TarInfo("x.jpg")
    header.size, header.type = len(image), tarfile.GNUTYPE_SPARSE
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[386:410] = b"%011o\0%011o\0" % (0, len(image))
    block[483:495] = b"%011o\0" % (len(image) + len(inner))
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    first, last = (tar_of(folder / "inner", pair(key, 3)).read_bytes() for key in ("a", "z"))
    first = first[: first.rindex(b"c") + 512 - first.rindex(b"c") % 512]
    (folder / "00000.tar").write_bytes(first + bytes(block) + image + inner + last)
    records, skipped = read("img2dataset", folder)
    assert [bytes_of(record) for record in records] == [[encoded(3)]] * len(records)
    assert skipped[0].samples == 1 and f"at byte {len(first)}" in skipped[0].reason


def test_links_and_pipes_in_a_shard_of_files_are_not_followed(read, write, tmp_path, pictures):
    shard = tmp_path / "crawl" / "00000"
    shard.mkdir(parents=True)
    for name, data in [*pair("00000/a", 1), *pair("00000/b", 2)]:
        write(f"crawl/{name}", data)
    (shard / "c.jpg").symlink_to(pictures / "0.jpg")
    (shard / "c.txt").write_text("linked")
    os.mkfifo(shard / "d.jpg")
    records, skipped = read("img2dataset", tmp_path / "crawl")
    assert [record.fields["key"] for record in records] == ["a", "b"]
    assert says(skipped, "00000 c: 0 pictures among its parts txt; give it one")


def test_scattered_parts_are_never_put_together(read, tmp_path):
    members = [pair("a", 1, "one"), pair("b", 2, "two"), pair("c", 3, "three")]
    tar_of(tmp_path / "crawl" / "00000.tar", list(itertools.chain(*zip(*members, strict=True))))
    records, skipped = read("img2dataset", tmp_path / "crawl")
    assert not records and sum("comes twice" in one.reason for one in skipped) == 3


def test_a_part_larger_than_any_picture_is_not_read(read, tmp_path, monkeypatch):
    monkeypatch.setattr("vlm.data_tools.sources.img2dataset._LARGEST", 20)
    tar_of(tmp_path / "crawl" / "00000.tar", pair("x"))
    _, skipped = read("img2dataset", tmp_path / "crawl")
    assert says(skipped, "00000.tar x: .jpg has ", "bytes, the limit is 20; drop it")


def test_captions_in_a_parquet_file_need_pyarrow(read, tmp_path, monkeypatch):
    """And nothing else does."""
    crawl(tmp_path / "crawl", 0, 1)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert len(read("img2dataset", tmp_path / "crawl")[0]) == 1
    crawl_without = tmp_path / "without"
    monkeypatch.undo()
    crawl(crawl_without, 0, 1, 0, caption=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    records, skipped = read("img2dataset", crawl_without)
    assert not records and says(skipped, "00000.parquet: pyarrow is needed to read it; pip install 'vlm[parquet]'")


def test_a_damaged_parquet_file_is_named_where_it_is_needed(read, tmp_path):
    crawl(tmp_path / "crawl", 0, 1, 0, caption=False)
    (tmp_path / "crawl" / "00000.parquet").write_bytes(b"PAR1")
    _, skipped = read("img2dataset", tmp_path / "crawl")
    assert says(skipped, "00000.parquet: can not be read (", "; download it again")


@pytest.mark.parametrize("stats", ["", "[]", "{}", '{"count": "x", "successes": 1}', "[" * 100_000])
def test_stats_that_say_nothing_leave_the_parquet_file(stats, read, tmp_path):
    crawl(tmp_path / "crawl", 0)
    (tmp_path / "crawl" / "00000_stats.json").write_text(stats)
    _, skipped = read("img2dataset", tmp_path / "crawl")
    assert says(skipped, "2 of 7 addresses were not downloaded; failed_to_download: 2")


def test_img2dataset_output_that_can_not_be_used(read, write, tmp_path, pictures):
    tar = crawl(tmp_path / "crawl", 0)
    for src, arguments, message in (
        (pictures, {}, "pictures: no .tar and no folder of pictures 00000; give the output folder of img2dataset"),
        (tar, {}, "00000.tar: no such folder; check the path"),
        (
            Path("pipe:curl http://x/00000.tar"),
            {},
            "a command or an address, which is neither run nor fetched; download",
        ),
        (Path("https://x/crawl"), {}, "a command or an address, which is neither run nor fetched"),
        (tmp_path / "crawl", {"images": pictures}, "--images: the pictures of this format lie in"),
    ):
        with pytest.raises(UsageError) as refusal:
            read("img2dataset", src, **arguments)
        assert message in str(refusal.value) and "\n" not in str(refusal.value)
