"""Shards in and out of object storage and over http: the bytes of a disk, in any process, and never half of them."""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import fsspec
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import vlm.data_tools.convert
from vlm.data_tools.convert import convert
from vlm.data_tools.engines import LocalEngine
from vlm.errors import RunError, UsageError
from vlm.shards import Shards
from vlm.storage import Folder, cache_folder

FORK = multiprocessing.get_context("fork")
LINES, PER_SHARD = 60, 10


class Numbers(Dataset):
    """The captions of shards by number."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> str:
        return str(self.shards[index].caption)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """An S3 server, and what a user would set to reach it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "none",
        "AWS_SHARED_CREDENTIALS_FILE": "none",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield settings["AWS_ENDPOINT_URL"]
    server.stop()


@pytest.fixture
def bucket(server: str, fresh_connections: None) -> str:
    """A bucket with nothing in it."""
    urlopen(f"{server}/moto-api/reset", data=b"").close()
    fsspec.filesystem("s3").mkdir("bucket")
    return "s3://bucket"


@pytest.fixture
def fresh_connections(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Connections of other settings are not gone on with."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield
    monkeypatch.undo()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Pictures with captions, of which every twentieth has no picture."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "0.png")
    lines = [{"image": "no.png" if n % 20 == 3 else "0.png", "caption": f"picture {n}"} for n in range(LINES)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "rows.jsonl"


@pytest.fixture
def local(rows: Path) -> dict[str, bytes]:
    """What a conversion to the disk leaves, by name."""
    convert(rows, rows.parent / "local", samples_per_shard=PER_SHARD, engine=LocalEngine(1))
    return {path.name: path.read_bytes() for path in (rows.parent / "local").iterdir()}


@pytest.fixture
def site(rows: Path, local: dict[str, bytes]) -> Iterator[Any]:
    """The folder of the shards over http: its `address`, how often each path was asked for, and `close`."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(rows.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.address = f"http://127.0.0.1:{server.server_port}/local"  # type: ignore[attr-defined]
        server.asked = asked  # type: ignore[attr-defined]
        yield server
        server.shutdown()


def stored(address: str) -> dict[str, bytes]:
    filesystem, path = fsspec.core.url_to_fs(address)
    filesystem.invalidate_cache()
    return {name.removeprefix(f"{path}/"): filesystem.cat_file(name) for name in filesystem.find(path)}


def captions(shards: Shards) -> list[str]:
    return [str(sample.caption) for sample in shards]


EXPECTED = [f"picture {number}" for number in range(LINES) if number % 20 != 3]


def in_processes(count: int, function: Callable[[int], None]) -> None:
    """Calls the function in so many forked processes; a hang is an error."""
    children = [FORK.Process(target=function, args=(number,)) for number in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        child.kill()
    assert [child.exitcode for child in children] == [0] * count


# Out


@pytest.mark.parametrize("processes", [1, 2])
def test_the_bytes_in_a_bucket_are_those_on_a_disk(processes: int, bucket: str, rows: Path, local: Any) -> None:
    """Written by forked processes too, whose parent has connections of its own, before, meanwhile and after."""
    Folder(bucket).names()
    convert(rows, f"{bucket}/out", samples_per_shard=PER_SHARD, engine=LocalEngine(processes))
    assert stored(f"{bucket}/out") == local and len(local) == 8
    assert captions(Shards.open(f"{bucket}/out")) == EXPECTED


def test_a_bucket_itself_and_memory_are_folders_too(bucket: str, rows: Path, local: Any) -> None:
    convert(rows, bucket, samples_per_shard=PER_SHARD, engine=LocalEngine(1))
    convert(rows, "memory://some/out", samples_per_shard=PER_SHARD, engine=LocalEngine(1))
    assert stored(bucket) == stored("memory://some/out") == local
    assert captions(Shards.open("memory://some/out")) == EXPECTED


def test_killed_half_way_there_is_no_index_and_it_goes_on(bucket: str, rows: Path, local: Any, monkeypatch) -> None:
    real, made = vlm.data_tools.convert.make_sample, []

    def dies(key: str, *rest: Any) -> Any:
        made.append(key)
        if len(made) == 35:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(key, *rest)

    arguments = {"out": f"{bucket}/out", "samples_per_shard": PER_SHARD, "engine": LocalEngine(1)}
    with monkeypatch.context() as patch:
        patch.setattr("vlm.data_tools.convert.make_sample", dies)
        child = FORK.Process(target=convert, args=(rows,), kwargs=arguments)
        child.start()
        child.join(60)
    assert child.exitcode == -signal.SIGKILL
    left = stored(f"{bucket}/out")
    assert "index.json" not in left and "00002.tar" in left and "00003.tar" not in left
    with pytest.raises(UsageError, match="out: no index.json; a conversion that was cut short. run it again"):
        Shards.open(f"{bucket}/out")
    monkeypatch.setattr("vlm.data_tools.convert.make_sample", lambda key, *rest: made.append(key) or real(key, *rest))
    convert(rows, **arguments)
    assert made[0] == f"{31:08d}" and stored(f"{bucket}/out") == local


def test_a_killed_conversion_of_other_settings_is_cleared_away(bucket: str, rows: Path, local: Any) -> None:
    with Folder(f"{bucket}/out/.job").write("settings.json") as file:
        file.write(b"others")
    with Folder(f"{bucket}/out").write("00099.tar") as file:
        file.write(b"of others")
    convert(rows, f"{bucket}/out", samples_per_shard=PER_SHARD, engine=LocalEngine(1))
    assert stored(f"{bucket}/out") == local


@pytest.mark.parametrize("name", ["thesis.txt", "index.json", "deep/thesis.txt"])
@pytest.mark.parametrize("place", ["", "/out"])
def test_what_others_keep_there_is_left_alone(name: str, place: str, bucket: str, rows: Path) -> None:
    fsspec.filesystem("s3").pipe(f"{bucket}{place}/{name}", b"years of work")
    with pytest.raises(UsageError, match=f"^{bucket}{place}: already there; choose another folder or remove it$"):
        convert(rows, f"{bucket}{place}", engine=LocalEngine(1))
    assert stored(bucket) == {f"{place}/{name}".lstrip("/"): b"years of work"}


@pytest.mark.parametrize("place", ["", "/out"])
def test_a_refused_conversion_leaves_nothing_but_the_bucket(place: str, bucket: str, rows: Path) -> None:
    rows.write_text('{"image": "no.png"}\n' * 30)
    with pytest.raises(UsageError, match="30 of 30 samples can not be used"):
        convert(rows, f"{bucket}{place}", samples_per_shard=PER_SHARD, engine=LocalEngine(2))
    assert stored(bucket) == {} and fsspec.filesystem("s3").exists(bucket)


# In


def test_forked_data_workers_read_what_the_parent_opened(bucket: str, rows: Path, local: Any) -> None:
    convert(rows, f"{bucket}/out", samples_per_shard=PER_SHARD, engine=LocalEngine(1))
    shards = Shards.open(f"{bucket}/out")
    assert shards[0].caption == EXPECTED[0]
    loader = DataLoader(Numbers(shards), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert list(loader) == EXPECTED
    assert captions(shards) == EXPECTED


def test_a_flipped_byte_is_refused_and_not_kept(bucket: str, rows: Path, local: Any) -> None:
    convert(rows, f"{bucket}/out", samples_per_shard=PER_SHARD, engine=LocalEngine(1))
    shards = Shards.open(f"{bucket}/out")
    flipped = bytearray(local["00000.tar"])
    flipped[700] ^= 1
    fsspec.filesystem("s3").pipe(f"{bucket}/out/00000.tar", bytes(flipped))
    with pytest.raises(UsageError, match=f"^{bucket}/out/00000.tar: sha256 .*, the index says .*; bytes have changed"):
        shards[0]
    assert shards[PER_SHARD].caption == EXPECTED[PER_SHARD]
    assert [path.read_bytes() for path in cache_folder().rglob("*.tar")] == [local["00001.tar"]]


def test_over_http_a_folder_is_fetched_once_by_all_processes(site: Any) -> None:
    shards = Shards.open(site.address)
    in_processes(3, lambda number: sys.exit(captions(shards) != EXPECTED))
    assert captions(shards) == EXPECTED
    assert sorted(site.asked) == sorted(["/local/index.json", *(f"/local/{number:05d}.tar" for number in range(6))])


def test_what_was_fetched_is_served_without_a_network(site: Any, local: Any) -> None:
    assert captions(Shards.open(site.address)) == EXPECTED
    site.shutdown()
    site.server_close()
    with pytest.warns(UserWarning, match="local/index.json: cannot be reached"):
        shards = Shards.open(site.address)
    assert captions(shards) == EXPECTED
    next(cache_folder().rglob(f"{hashlib.sha256(local['00003.tar']).hexdigest()}.tar")).unlink()
    with pytest.raises(RunError, match="^http://127.0.0.1:.*/local/00003.tar: cannot be reached .*; check the address"):
        captions(Shards(shards.files))


def test_over_http_a_tar_or_several(site: Any, rows: Path, local: Any) -> None:
    assert captions(Shards.open(f"{site.address}/00000.tar")) == EXPECTED[:9]
    assert captions(Shards.open(f"{site.address}/{{00000..00005}}.tar")) == EXPECTED
    assert site.asked.count("/local/00000.tar") == 1
    (rows.parent / "local" / "00000.tar").write_bytes(local["00001.tar"])
    os.utime(rows.parent / "local" / "00000.tar", (1, 1))
    assert captions(Shards.open(f"{site.address}/00000.tar")) == EXPECTED[9:19], "it was changed at its address"


# What goes wrong


def refused(function: Callable[[], Any]) -> str:
    """The one line that an error is, without the address of the server."""
    with pytest.raises((UsageError, RunError)) as failure:
        function()
    assert "\n" not in str(failure.value)
    return str(failure.value)


def check_credentials(server: str, after: bytes) -> None:
    """Have the server check who asks, after so many requests."""
    urlopen(Request(f"{server}/moto-api/reset-auth", data=after, headers={"Content-Type": "text/plain"})).close()


def test_missing_places_are_named(bucket: str, site: Any, rows: Path) -> None:
    for place in (f"{bucket}/none", "s3://other/none", f"{site.address}/none"):
        assert refused(lambda place=place: Shards.open(place)).startswith(f"{place}: no index.json; a conversion that")
        line = f"{place}.tar: nothing is there; check the address"
        assert refused(lambda place=place: Shards.open(f"{place}.tar")) == line
    to_other = functools.partial(convert, rows, "s3://other/out", engine=LocalEngine(1))
    assert refused(to_other) == "s3://other/out/.job: no such bucket or folder; make it first"
    to_site = functools.partial(convert, rows, f"{site.address}/new", engine=LocalEngine(1))
    assert refused(to_site).startswith(f"{site.address}/new/.job/settings.json: cannot be reached (")


def test_credentials_that_are_missing_or_wrong_are_named(bucket: str, server: str, rows: Path, monkeypatch) -> None:
    check_credentials(server, after=b"0")
    try:
        for function in (
            lambda: Shards.open(f"{bucket}/out"),
            lambda: Shards.open(f"{bucket}/00000.tar"),
            lambda: convert(rows, f"{bucket}/out", engine=LocalEngine(1)),
        ):
            line = refused(function)
            assert line.startswith(f"{bucket}/") and line.endswith("; check the address and your credentials")
            assert "cannot be reached (" in line
    finally:
        check_credentials(server, after=b"inf")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    line = refused(lambda: convert(rows, f"{bucket}/out", engine=LocalEngine(1)))
    assert "cannot be reached (Unable to locate credentials); check the address and your credentials" in line


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, fresh_connections: None) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    line = "s3://bucket/out/index.json: a package is missing (Install s3fs to access S3); pip install 'vlm[remote]'"
    assert refused(lambda: Shards.open("s3://bucket/out")) == line


def test_a_storage_that_breaks_off_leaves_the_work_for_going_on(
    bucket: str, rows: Path, local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3 = fsspec.get_filesystem_class("s3")
    real = s3._put_file

    async def breaks(self: Any, source: str, target: str, **options: Any) -> None:
        if target.endswith("00003.tar"):
            raise ConnectionError("reset by peer")
        await real(self, source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(s3, "_put_file", breaks)
        s3.clear_instance_cache()
        line = refused(lambda: convert(rows, f"{bucket}/out", samples_per_shard=PER_SHARD, engine=LocalEngine(1)))
        assert line.startswith(f"{bucket}/out/00003.tar: cannot be reached (reset by peer)")
    assert "index.json" not in (left := stored(f"{bucket}/out")) and "00002.tar" in left
    s3.clear_instance_cache()
    convert(rows, f"{bucket}/out", samples_per_shard=PER_SHARD, engine=LocalEngine(1))
    assert stored(f"{bucket}/out") == local
