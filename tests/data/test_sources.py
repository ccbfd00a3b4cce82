"""The formats of `vlm data convert` alike: memory, corrupt pictures, what is skipped, wrong options."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from source_files import coco, crawl, encoded, pair, tar_of, turns, vqa

from vlm.data_tools.convert import Converted, convert
from vlm.data_tools.engines import LocalEngine
from vlm.data_tools.sources import SOURCES, Skipped, open_source
from vlm.errors import UsageError
from vlm.shards import Shards


def sized(format: str, folder: Path, count: int, *, pictures: bool = False) -> dict[str, Any]:
    """What `open_source` takes for so many samples of a format; with `pictures`, they are there."""
    folder.mkdir()
    images = folder / "images"
    images.mkdir()
    if pictures and format != "img2dataset":
        for number in range(count):
            (images / f"{number}.jpg").write_bytes(encoded(number))
    src, options = folder / "source", {"images": images}
    if format == "jsonl":
        lines = ({"image": f"{n}.jpg", "caption": f"caption {n}"} for n in range(count))
        src.write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif format == "csv":
        src.write_text("image,caption\n" + "".join(f'{n}.jpg,"caption {n}"\n' for n in range(count)))
    elif format == "coco":
        src.write_text(json.dumps(coco(count, 2)))
    elif format == "vqa":
        questions, annotations = vqa(count, 2)
        src.write_text(json.dumps(questions))
        options["annotations"] = folder / "annotations"
        options["annotations"].write_text(json.dumps(annotations))
    elif format == "llava":
        src.write_text(
            json.dumps([{"image": f"{n}.jpg", "conversations": turns("<image>", f"a {n}")} for n in range(count)])
        )
    elif format == "folder":
        src, options = folder, {}
        if not pictures:
            for number in range(count):
                (images / f"{number}.jpg").touch()
    else:
        src, options = folder, {}
        images.rmdir()
        for start in range(0, count, 50):
            members = [pair(f"{n:09d}", n, f"caption {n}") for n in range(start, start + 50)]
            tar_of(folder / f"{start // 50:05d}.tar", list(itertools.chain(*members)))
    return {"src": src, **options}


@pytest.mark.parametrize("format", [name for name in SOURCES if name != "img2dataset"])
def test_rows_do_not_hold_the_set(format, tmp_path):
    """Ten times as many samples take the same memory. What SQLite takes beside is bounded by its own setting."""
    peaks = {}
    for count in (500, 5000):
        source = open_source(format, **sized(format, tmp_path / str(count), count))
        tracemalloc.start()
        rows = sum(1 for row in source.rows(tmp_path / "scratch") if not isinstance(row, Skipped))
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert rows == count and source.count() == count
    # 5 000 rows that are held would be half a megabyte and more; what else this process does meanwhile is counted too.
    assert peaks[5000] < 1.2 * peaks[500] + 100_000, peaks


def test_tables_keep_a_bounded_part_in_memory(tmp_path):
    from vlm.data_tools.sources.tables import Tables

    with Tables(tmp_path, "") as tables:
        (kibibytes,) = tables.execute("PRAGMA cache_size").fetchone()
        assert -65536 <= kibibytes < 0


def test_a_disk_that_runs_full_under_the_tables_says_so(tmp_path):
    from vlm.data_tools.sources.tables import Tables

    with Tables(tmp_path, "CREATE TABLE a (b);") as tables:
        tables.execute("PRAGMA max_page_count = 20")
        with pytest.raises(OSError, match="No space left on device"):
            for _ in range(100):
                tables.execute("INSERT INTO a VALUES (?)", ("x" * 4000,))


@pytest.mark.parametrize("format", SOURCES)
def test_one_corrupt_picture_in_a_hundred_is_skipped_and_counted(format, tmp_path):
    """Converted on one process and on two, to the same bytes."""
    arguments = sized(format, tmp_path / "in", 200, pictures=True)
    bad = {37, 190}
    damage(format, arguments, bad)
    written = []
    for processes in (1, 2):
        out = tmp_path / f"out{processes}"
        counts = convert(out=out, format=format, samples_per_shard=60, engine=LocalEngine(processes), **arguments)
        assert counts == Converted(samples=198, skipped=2)
        written.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert written[0] == written[1] and "skipped.jsonl" in written[0]
    samples = list(Shards.open(tmp_path / "out1"))
    images = {sample.images[0] for sample in samples}
    assert images == {encoded(number) for number in range(200) if number not in bad}


@pytest.mark.parametrize("format", SOURCES)
def test_where_all_pictures_are_corrupt_it_stops(format, tmp_path):
    arguments = sized(format, tmp_path / "in", 50, pictures=True)
    damage(format, arguments, set(range(50)))
    with pytest.raises(UsageError, match="50 of 50 samples can not be used, and 10% may; mend them or raise"):
        convert(out=tmp_path / "out", format=format, **arguments)
    assert not (tmp_path / "out").exists()


def damage(format: str, arguments: dict[str, Any], numbers: set[int]) -> None:
    """Cut these pictures in half."""
    for number in numbers:
        if format == "img2dataset":
            path = arguments["src"] / f"{number // 50:05d}.tar"
            data, good = path.read_bytes(), encoded(number)
            path.write_bytes(data.replace(good, good[: len(good) // 2] + bytes(len(good) - len(good) // 2)))
        else:
            folder = arguments["src"] if format == "folder" else arguments["images"].parent
            path = folder / "images" / f"{number}.jpg"
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_what_is_skipped_of_a_shard_is_counted(tmp_path):
    """The samples that a cut tar has lost are, and addresses that were never downloaded are told and are not."""
    tar = crawl(tmp_path / "crawl", 0, 30)
    tar.write_bytes(tar.read_bytes()[: -100 * 512])
    counts = convert(tmp_path / "crawl", tmp_path / "out", "img2dataset", max_skipped=0.9)
    assert counts.samples + counts.skipped == 30 and counts.skipped > 5
    assert len(Shards.open(tmp_path / "out")) == counts.samples
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert f"{counts.skipped} samples are lost" in reasons[0] and "2 of 32 addresses were not downloaded" in reasons[1]


def test_what_a_source_skips_without_work_is_counted(tmp_path, write, pictures):
    told = coco(3)
    told["images"].append({"id": 77, "file_name": "3.jpg"})
    counts = convert(write("a.json", told), tmp_path / "out", "coco", pictures, max_skipped=0.5)
    assert counts == Converted(samples=3, skipped=1)


@pytest.mark.parametrize("format", SOURCES)
def test_an_option_of_another_format_is_named(format, tmp_path):
    arguments = sized(format, tmp_path / "in", 50)
    given = {"columns": {}, "annotations": Path("a"), "template": "{}"}
    for name in set(given) - set(SOURCES[format].options):
        with pytest.raises(UsageError) as refusal:
            open_source(format, **arguments | {name: given[name]})
        flag = {"columns": "--column"}.get(name, f"--{name}")
        assert str(refusal.value).startswith(f"{flag}: not for {format}, which takes ")
        assert str(refusal.value).endswith("; leave it out")


def test_a_format_that_is_not_known_is_named(tmp_path):
    with pytest.raises(
        UsageError, match="format 'parquet' is not known; use one of jsonl, coco, vqa, llava, csv, folder"
    ):
        open_source("parquet", tmp_path, None)


@pytest.mark.parametrize("format", SOURCES)
def test_a_source_that_can_not_be_read_is_named(format, tmp_path, monkeypatch):
    arguments = sized(format, tmp_path / "in", 50)

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    source = open_source(format, **arguments)
    for place in ("base.open", "jsonl.open", "folder.os.scandir", "img2dataset.os.scandir"):
        monkeypatch.setattr(f"vlm.data_tools.sources.{place}", denied, raising=False)
    with pytest.raises(UsageError, match="can not be read .Permission denied.; check its permissions"):
        list(source.rows(tmp_path / "scratch"))
