"""Starting ranks: how many, and what a person hears when one fails."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from vlm.errors import RunError, UsageError
from vlm.train.__main__ import main
from vlm.train.launch import first_failure, launch, process_count


def failure(tmp_path, rank: int, exitcode: int = 1, text: str | None = None, at: int = 0) -> ProcessFailure:
    """What the launcher reports of a rank that wrote `text` as its error, or nothing."""
    file = tmp_path / f"{rank}.json"
    if text is not None:
        record = {"message": text, "extraInfo": {"py_callstack": "Traceback …\n", "timestamp": str(at)}}
        file.write_text(json.dumps({"message": record}))
    return ProcessFailure(local_rank=rank, pid=1, exitcode=exitcode, error_file=str(file))


def test_process_count(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert process_count(None, None) == 1
    assert process_count(None, 3) == 3
    with pytest.raises(UsageError, match="--gpus is 2, and 0 are there"):
        process_count(2, None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert process_count(None, None) == 4
    assert process_count(2, None) == 2
    with pytest.raises(UsageError, match="both given"):
        process_count(2, 2)


def test_an_error_with_a_mend_comes_first(tmp_path, capsys):
    failures = {
        0: failure(tmp_path, 0, text="RuntimeError: connection reset", at=1),
        1: failure(tmp_path, 1, text="UsageError: shards x: missing: mend it", at=2),
    }
    error = first_failure(failures)
    assert isinstance(error, UsageError) and str(error) == "shards x: missing: mend it"
    assert capsys.readouterr().err == ""


def test_a_fault_of_ours_shows_its_traceback_once(tmp_path, capsys):
    failures = {
        0: failure(tmp_path, 0, exitcode=-15),
        1: failure(tmp_path, 1, text="ValueError: boom\nmore", at=5),
        2: failure(tmp_path, 2, text="ValueError: boom as well", at=9),
    }
    error = first_failure(failures)
    assert isinstance(error, RunError) and str(error) == "rank 1 failed: ValueError: boom"
    assert capsys.readouterr().err == "Traceback …\n"


def test_a_killed_rank(tmp_path):
    assert "rank 0 was killed by SIGKILL; if memory ran out" in str(first_failure({0: failure(tmp_path, 0, -9)}))
    assert "rank 0 ended with exit code 3" in str(first_failure({0: failure(tmp_path, 0, 3)}))


def test_ranks_fail_with_one_line(capfd, monkeypatch):
    """Two real processes that both meet the same error. Nothing changes for the one that started them."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    handlers, environment = [signal.getsignal(number) for number in signal.valid_signals()], dict(os.environ)
    with pytest.raises(UsageError, match="^config no-such.yaml does not exist; give a YAML file"):
        launch("no-such.yaml", ["out=x"], processes=2, resume=False)
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err and "error:" not in captured.err
    assert [signal.getsignal(number) for number in signal.valid_signals()] == handlers
    assert dict(os.environ) == environment


def test_one_rank_by_hand(capsys):
    assert main(["--config", "no-such.yaml", "--local_rank=0"]) == 2
    assert capsys.readouterr().err.startswith("error: config no-such.yaml does not exist")
    assert main(["--config", "demo", "out=x", "--deepspeed", "--deepspeed_config", "ds.json", "stages.0.x=1"]) == 2
    assert "stages.0.x is not a known key" in capsys.readouterr().err
