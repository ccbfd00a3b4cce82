"""Several processes of one run: the first failure ends them all."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

from vlm.errors import UsageError
from vlm.processes import in_processes

WORK = """
import os
import time
from pathlib import Path

from vlm.errors import UsageError


def work(folder, share):
    begun = Path(folder) / f"{share.process}.begun"
    begun.write_text(str(os.getpid()))
    begun.rename(begun.with_suffix(".pid"))
    if share.process:
        time.sleep(30)
        (Path(folder) / "went on").touch()
    while len(list(Path(folder).glob("*.pid"))) < share.processes:
        time.sleep(0.01)
    raise UsageError("the first has failed")
"""


def test_the_first_failure_ends_the_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fails_first.py").write_text(WORK)
    monkeypatch.syspath_prepend(tmp_path)
    work = importlib.import_module("fails_first").work
    with pytest.raises(UsageError, match="the first has failed"):
        in_processes(work, 2, str(tmp_path), mend="buy memory")
    assert not (tmp_path / "went on").exists()
    for file in tmp_path.glob("*.pid"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)
