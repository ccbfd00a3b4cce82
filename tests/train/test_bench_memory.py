"""The bench of long texts: a process of its own says what a step took, and rows put long beside short."""

from __future__ import annotations

import subprocess

import pytest

from vlm.errors import RunError
from vlm.train import bench_memory


def test_a_length_is_measured_in_a_process_of_its_own():
    told = bench_memory.measured(512, checkpointed=False)
    assert told["device"] in ("cpu", "cuda")
    # The logits of one chunk and the gradients of the vocabulary are in it, however short the text.
    assert told["mib"] > 2 * 4 * bench_memory.WIDTH * bench_memory.VOCABULARY / 2**20


def test_a_failed_process_is_told_in_one_line(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nMemoryError: 5 GiB\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RunError, match="^a text of 7 tokens failed: MemoryError: 5 GiB$"):
        bench_memory.measured(7, checkpointed=True)


def test_rows_put_long_beside_short(monkeypatch):
    peaks = {(16384, False): 4.0, (4096, False): 1.0, (16384, True): 3.0, (4096, True): 1.5}
    monkeypatch.setattr(bench_memory, "measured", lambda *asked: {"mib": peaks[asked], "device": "cpu"})
    assert [row.ratio for row in bench_memory.rows()] == [4.0, 2.0]
