"""Engines and jobs: results in order, few pieces ahead, and after any kill the output that an undisturbed run leaves."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from waiting import eventually

import vlm.data_tools.engines
import vlm.data_tools.job
from vlm.data_tools.engines import AHEAD, LocalEngine, make_engine
from vlm.data_tools.job import PieceWriter, job
from vlm.data_tools.ray_engine import RayEngine
from vlm.errors import RunError, UsageError
from vlm.samples import SampleError
from vlm.storage import Folder

PIECES = 12
FORK = multiprocessing.get_context("fork")


def square(number: int) -> int:
    time.sleep(0.01 if number % 3 == 0 else 0)
    return number**2


def fails_at(failure: BaseException, place: int, number: int) -> int:
    if number == place:
        raise failure
    return number


def dies(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write_piece(pause: float, marks: str, folder: Folder, number: int, piece: int) -> dict[str, Any]:
    """A shard of four samples, slowly, and a mark that it was begun."""
    Path(marks, f"{number}-{time.monotonic_ns()}").touch()
    with PieceWriter(folder, number, most_bytes=3000) as writer:
        for part in range(4):
            time.sleep(pause)
            writer.write(f"{number}-{part}", {"txt": random.Random(piece * 10 + part).randbytes(1000)})
    return {"shards": writer.shards}


def run(out: Path, marks: Path, processes: int = 2, pause: float = 0.0, settings: Any = None) -> list[dict[str, Any]]:
    marks.mkdir(exist_ok=True)
    with job(out, settings or {"pieces": PIECES}, LocalEngine(processes)) as work:
        return list(work.run("write", partial(write_piece, pause, str(marks)), iter(range(PIECES))))


def apart(function: Any, *arguments: Any) -> Any:
    """A process that calls the function, and leads a group of its own."""

    def lead() -> None:
        os.setsid()
        function(*arguments)

    child = FORK.Process(target=lead)
    child.start()
    return child


def kill(child: Any, group: bool = True) -> None:
    (os.killpg if group else os.kill)(child.pid, signal.SIGKILL)
    child.join()


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Engines


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_results_come_in_order(processes: int) -> None:
    assert list(LocalEngine(processes).map(square, iter(range(50)))) == [number**2 for number in range(50)]
    assert list(LocalEngine(processes).map(square, [])) == []


@pytest.mark.parametrize("processes", [1, 2])
def test_few_items_are_taken_ahead(processes: int) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(200):
            taken.append(number)
            yield number

    results = LocalEngine(processes).map(square, items())
    assert not taken
    for number in range(40):
        assert next(results) == number**2
        assert len(taken) <= number + 1 + AHEAD * processes
    results.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "failure",
    [UsageError("a.jsonl: bad; mend it"), SampleError("s"), RunError("r"), TypeError("t"), OSError(28, "full")],
)
def test_what_is_raised_arrives_as_itself_after_the_results_before_it(processes: int, failure: Exception) -> None:
    results = LocalEngine(processes).map(partial(fails_at, failure, 5), range(20))
    assert [next(results) for _ in range(5)] == list(range(5))
    with pytest.raises(type(failure)) as caught:
        next(results)
    assert type(caught.value) is type(failure) and str(caught.value) == str(failure)
    assert getattr(caught.value, "errno", None) == getattr(failure, "errno", None)


def test_a_worker_that_dies_is_one_line() -> None:
    with pytest.raises(RunError, match="^a worker process died, of memory perhaps; run the command again to go on$"):
        list(LocalEngine(2).map(dies, range(9)))


@pytest.mark.parametrize("group", [False, True])
def test_workers_end_with_the_one_who_gave_them_work(group: bool, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(vlm.data_tools.engines, "WATCH", 0.02)
    child = apart(lambda: list(LocalEngine(2).map(partial(note_and_wait, str(tmp_path)), range(9))))
    eventually(lambda: len(list(tmp_path.iterdir())) == 2)
    kill(child, group)
    eventually(lambda: not any(is_alive(int(path.name)) for path in tmp_path.iterdir()))


def note_and_wait(folder: str, number: int) -> None:
    Path(folder, str(os.getpid())).touch()
    time.sleep(60)


def is_alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def test_engines_are_made_by_name() -> None:
    local = make_engine("local", 3)
    assert isinstance(local, LocalEngine) and local.processes == 3
    assert isinstance(make_engine("ray", None), RayEngine)
    with pytest.raises(UsageError, match="engine 'spark' is not known; use one of local, ray$"):
        make_engine("spark", None)
    with pytest.raises(UsageError, match="^0 processes; give at least 1$"):
        make_engine("local", 0)
    with pytest.raises(UsageError, match="^-1 processes; give at least 1$"):
        LocalEngine(-1)


# Jobs


def test_bytes_and_results_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    one, two = (run(tmp_path / str(count), tmp_path / "marks", count) for count in (1, 2))
    assert one == two and written(tmp_path / "1") == written(tmp_path / "2")
    assert len(written(tmp_path / "1")) == 4 * PIECES


@pytest.mark.parametrize("processes", [1, 2])
def test_after_kills_at_any_moment_the_output_is_that_of_an_undisturbed_run(processes: int, tmp_path: Path) -> None:
    straight = run(tmp_path / "straight", tmp_path / "marks")
    delays, out = random.Random(processes), tmp_path / "out"
    for _ in range(6):
        child = apart(run, out, tmp_path / "marks", processes, 0.01)
        child.join(delays.uniform(0.02, 0.15))
        if child.exitcode is not None:
            break
        kill(child)
        assert not out.exists()
    if not out.exists():
        assert run(out, tmp_path / "marks", processes) == straight
    assert written(out) == written(tmp_path / "straight")
    assert {path.name for path in tmp_path.iterdir()} == {"straight", "out", "marks"}


def test_no_piece_is_done_twice(tmp_path: Path) -> None:
    marks, out = tmp_path / "marks", tmp_path / "out"
    child = apart(run, out, marks, 1, 0.01)
    states = tmp_path / ".out.partial" / ".job"
    eventually(lambda: len(list(states.glob("write-*.json"))) >= 4)
    kill(child)
    done = {int(path.stem.partition("-")[2]) for path in states.glob("write-*.json")}
    begun = {path.name for path in marks.iterdir()}
    run(out, marks)
    again = {int(path.name.partition("-")[0]) for path in marks.iterdir() if path.name not in begun}
    assert again == set(range(PIECES)) - done and len(list(marks.iterdir())) == len(begun) + len(again)


def test_other_settings_start_anew(tmp_path: Path) -> None:
    marks, out = tmp_path / "marks", tmp_path / "out"
    child = apart(run, out, marks, 1, 0.02)
    eventually(lambda: list((tmp_path / ".out.partial" / ".job").glob("write-*.json")))
    kill(child)
    (tmp_path / ".out.partial" / "99999.tar").write_bytes(b"of those settings")
    before = len(list(marks.iterdir()))
    run(out, marks, settings={"pieces": "others"})
    assert len(list(marks.iterdir())) == before + PIECES
    assert "99999.tar" not in written(out)


@pytest.mark.parametrize("settings", [None, {"pieces": "others"}])
def test_two_at_once_are_refused(settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the second was asked for, the first is not disturbed."""
    monkeypatch.setattr(vlm.data_tools.job, "ENDING", 0.1)
    marks, out = tmp_path / "marks", tmp_path / "out"
    child = apart(run, out, marks, 2, 0.05)
    eventually(lambda: list((tmp_path / ".out.partial" / ".job").glob("write-*.json")))
    with pytest.raises(UsageError, match=re.escape(f"{out}: another process is writing it; wait for it or choose")):
        run(out, marks, settings=settings)
    child.join()
    assert child.exitcode == 0 and len(written(out)) == 4 * PIECES


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), RunError("lost"), TypeError("a mistake")])
def test_what_the_caller_can_not_mend_leaves_the_work_for_going_on(interruption: BaseException, tmp_path: Path) -> None:
    marks, out = tmp_path / "marks", tmp_path / "out"
    work = partial(fails_before, interruption, partial(write_piece, 0.0, str(tmp_path)))
    with pytest.raises(type(interruption)), job(out, {"pieces": PIECES}, LocalEngine(1)) as interrupted:
        list(interrupted.run("write", work, range(PIECES)))
    assert not out.exists()
    run(out, marks)
    assert len(list(marks.iterdir())) == PIECES - 7


def fails_before(failure: BaseException, work: Any, folder: Folder, number: int, piece: int) -> dict[str, Any]:
    return work(folder, number, fails_at(failure, 7, number))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_usage_error_leaves_nothing(processes: int, tmp_path: Path) -> None:
    work = partial(fails_before, UsageError("bad"), partial(write_piece, 0.0, str(tmp_path)))
    with pytest.raises(UsageError), job(tmp_path / "out", {}, LocalEngine(processes)) as failed:
        list(failed.run("write", work, range(PIECES)))
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
