"""Curves in Weights & Biases and trackio: offline, without an account, and one line where a package is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from vlm.errors import UsageError
from vlm.train.boards import check_boards, open_boards
from vlm.train.config import Log


def is_here(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_package_that_is_missing(run, tmp_path, name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)  # as Python marks what cannot be imported
    with pytest.raises(
        UsageError, match=f"^log.{name} is set, and {name} is not installed; pip install 'vlm\\[{name}\\]'"
    ):
        run({"objective": "clm"}, log={name: "mine"})
    assert not (tmp_path / "run").exists()
    check_boards(Log())


@pytest.mark.skipif(not is_here("trackio"), reason="trackio is not installed: pip install 'vlm[trackio]'")
def test_trackio_holds_the_curves_of_a_run_and_of_its_resumption(tmp_path):
    """In a process of its own, for trackio reads its folder's name when it is imported."""
    script = """if True:
        import sys
        from pathlib import Path
        from vlm.train.boards import open_boards
        from vlm.train.config import Log
        out = Path(sys.argv[1])
        for resumed, steps in ((False, (1, 2)), (True, (3,))):
            boards = open_boards(Log(trackio="mine"), out, resumed)
            for step in steps:
                for board in boards:
                    board.add(0, step, {"loss": 1.0 / step})
            for board in boards:
                board.close()
    """
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with closing(sqlite3.connect(tmp_path / "trackio" / "mine.db")) as kept:
        points = kept.execute("SELECT run_id, step, metrics FROM metrics ORDER BY id").fetchall()
    assert len({run for run, _, _ in points}) == 1
    told = [(step, json.loads(metrics)) for _, step, metrics in points]
    assert told == [(step, {"stage0/loss": 1.0 / step}) for step in (1, 2, 3)]


@pytest.mark.skipif(not is_here("wandb"), reason="wandb is not installed: pip install 'vlm[wandb]'")
def test_wandb_writes_offline_and_goes_on_with_its_run(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    names = []
    for resumed in (False, True):
        for board in open_boards(Log(wandb="mine"), tmp_path, resumed):
            board.add(0, 1, {"loss": 0.5})
            board.close()
        names.append((tmp_path / "wandb" / "vlm-run-id").read_text())
    assert names[0] == names[1]
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert runs and all(path.name.endswith(names[0]) and list(path.glob("*.wandb")) for path in runs)
