"""The Ray engine on a local cluster of two nodes: what it leaves is what the local one leaves, node killed or not."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
from moto.server import ThreadedMotoServer

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'vlm[ray]'")
from ray.cluster_utils import Cluster  # noqa: E402

from vlm.data_tools.convert import convert  # noqa: E402
from vlm.data_tools.engines import LocalEngine, make_engine  # noqa: E402
from vlm.data_tools.ray_engine import AHEAD, RayEngine  # noqa: E402
from vlm.data_tools.sources import SOURCES  # noqa: E402
from vlm.data_tools.sources.jsonl import JsonLines  # noqa: E402
from vlm.errors import RunError, UsageError  # noqa: E402

# What stands in this file can not be imported on a node: it travels as it is.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
LINES, PER_SHARD = 120, 10


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket, and in the environment what it takes to reach it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "secret")
        s3 = fsspec.get_filesystem_class("s3")
        s3.clear_instance_cache()
        s3().mkdir("nodes")  # no bucket of another module: its server may have run in this process
        yield "s3://nodes"
        s3.clear_instance_cache()
    server.stop()


@pytest.fixture(scope="module")
def cluster(bucket: str) -> Iterator[Cluster]:
    """Two nodes of one core each, found by RAY_ADDRESS as a user's would be; they inherit the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # at Ray's 15 a busy machine hardly lets them import the package
        # A killed node is noticed in seconds; one that is slow to answer is given its time.
        health = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}
        nodes = Cluster(initialize_head=True, head_node_args=NODE | {"_system_config": health})
        try:
            nodes.add_node(**NODE)
            patch.setenv("RAY_ADDRESS", nodes.address)
            yield nodes
        finally:
            ray.shutdown()
            nodes.shutdown()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Lines of which every fortieth can not be used."""
    lines = ["bad" if number % 40 == 7 else json.dumps({"text": f"line {number}"}) for number in range(LINES)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path / "rows.jsonl"


def node() -> str:
    return ray.get_runtime_context().get_node_id()


def square(number: int) -> tuple[int, str]:
    time.sleep(0.02)
    return number**2, node()


def fails_at(failure: Exception, place: int, number: int) -> int:
    if number == place:
        raise failure
    return number


def fails_or_takes_time(folder: str, number: int) -> None:
    Path(folder, f"begun-{number}").touch()
    if number == 2:
        raise UsageError("bad")
    time.sleep(0.5 if number > 2 else 0)
    Path(folder, f"ended-{number}").touch()


class Marked(JsonLines):
    """Lines that take their time, each with a mark of the node and process; only the doomed node works until it is dead."""

    def records(self, row: tuple[int, bytes]) -> Any:
        """Those of the line."""
        folder = self.src.parent
        (folder / f"mark-{row[0]:03d}-{node()}-{os.getpid()}").touch()
        while (folder / "doomed").is_file() and (folder / "doomed").read_text() != node():
            time.sleep(0.01)
        time.sleep(0.02)
        return super().records(row)


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_results_come_in_order_from_both_nodes(cluster: Cluster) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(40):
            taken.append(number)
            yield number

    results = RayEngine().map(square, items())
    assert not taken
    nodes = set()
    for number in range(40):
        result, where = next(results)
        nodes.add(where)
        assert result == number**2 and len(taken) <= number + 1 + AHEAD * 2
    assert len(nodes) == 2 and list(results) == []
    assert [result for result, _ in RayEngine(1).map(square, range(3))] == [0, 1, 4]
    assert list(RayEngine().map(square, [])) == []


@pytest.mark.parametrize("failure", [UsageError("a.jsonl: bad"), RunError("r"), TypeError("t"), OSError(28, "full")])
def test_what_is_raised_arrives_as_itself(cluster: Cluster, failure: Exception) -> None:
    results = RayEngine().map(partial(fails_at, failure, 5), range(20))
    assert [next(results) for _ in range(5)] == list(range(5))
    with pytest.raises(type(failure)) as caught:
        next(results)
    assert type(caught.value) is type(failure) and str(caught.value) == str(failure)
    assert getattr(caught.value, "errno", None) == getattr(failure, "errno", None)


def test_after_a_failure_what_was_begun_is_ended_and_no_more_is_begun(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        list(RayEngine().map(partial(fails_or_takes_time, str(tmp_path)), range(20)))
    marks = {path.name for path in tmp_path.iterdir()}
    begun = {int(name.removeprefix("begun-")) for name in marks if name.startswith("begun-")}
    assert {name for name in marks if name.startswith("ended-")} == {f"ended-{number}" for number in begun - {2}}
    assert begun == set(range(len(begun))) and len(begun) <= 3 + AHEAD * 2


def test_what_ray_gives_up_is_one_line(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: Any) -> None:
        raise ray.exceptions.WorkerCrashedError()

    monkeypatch.setattr(ray, "get", lost)
    with pytest.raises(RunError, match="^Ray lost a piece of the work .*; run the command again to go on$") as failure:
        list(RayEngine().map(square, range(2)))
    assert "\n" not in str(failure.value)


def test_relative_paths_mean_what_they_mean_where_the_command_was_given(
    cluster: Cluster, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(rows.parent)
    convert(rows.name, "out", samples_per_shard=PER_SHARD, engine=make_engine("ray", None))
    convert(rows.name, "local", samples_per_shard=PER_SHARD, engine=LocalEngine(1))
    assert written(rows.parent / "out") == written(rows.parent / "local") and (rows.parent / "out/00011.tar").is_file()


def test_nodes_write_to_a_bucket(cluster: Cluster, bucket: str, rows: Path) -> None:
    convert(rows, f"{bucket}/out", samples_per_shard=PER_SHARD, engine=RayEngine())
    convert(rows, rows.parent / "local", samples_per_shard=PER_SHARD, engine=LocalEngine(1))
    s3 = fsspec.filesystem("s3")
    stored = {name.rpartition("/")[2]: s3.cat_file(name) for name in s3.find("nodes/out")}
    assert stored == written(rows.parent / "local")


def test_a_folder_that_a_node_has_not_is_named(cluster: Cluster, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("os.getcwd", lambda: str(tmp_path / "gone"))
    line = "gone: No such file or directory on node .*; start the command in a folder that"
    for _ in range(20):  # pieces that fail at the same time, which Ray may not be told to call off
        with pytest.raises(RunError, match=line):
            list(RayEngine().map(square, range(3)))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_a_cluster_that_is_not_there_is_named(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    line = f"RAY_ADDRESS {address}: Ray cannot be reached ([Errno 111] Connection refused); see `ray status`"
    with pytest.raises(RunError, match=f"^{re.escape(line)}$"):
        list(RayEngine().map(square, range(3)))


def test_where_there_is_no_ray_the_package_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=re.escape("engine ray: Ray is not installed; pip install 'vlm[ray]'")):
        list(RayEngine().map(square, range(3)))


def test_a_node_killed_in_the_middle_changes_nothing(cluster: Cluster, rows: Path, monkeypatch) -> None:
    """Its pieces are done on the other one; the bytes are those of the local engine. The last test: the node is gone."""
    doomed = next(iter(cluster.worker_nodes))
    (rows.parent / "doomed").write_text(doomed.node_id)

    def kill_at_work() -> None:
        while len(marks := list(rows.parent.glob(f"mark-*-{doomed.node_id}-*"))) % PER_SHARD not in (4, 5, 6):
            time.sleep(0.005)
        os.kill(doomed.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        for process in {int(path.name.rpartition("-")[2]) for path in marks}:
            os.kill(process, signal.SIGKILL)
        (rows.parent / "doomed").unlink()

    counts = convert(rows, rows.parent / "local", samples_per_shard=PER_SHARD, engine=LocalEngine(1))
    monkeypatch.setitem(SOURCES, "jsonl", Marked)
    killer = threading.Thread(target=kill_at_work, daemon=True)
    killer.start()
    assert convert(rows, rows.parent / "out", samples_per_shard=PER_SHARD, engine=RayEngine()) == counts
    killer.join(timeout=1)
    assert not (rows.parent / "doomed").exists() and counts.skipped == 3
    assert written(rows.parent / "out") == written(rows.parent / "local")
    marks = [path.name.split("-")[1] for path in rows.parent.glob("mark-*")]
    assert len(set(marks)) == LINES < len(marks), "the lines of a piece that was broken off were read once more"
