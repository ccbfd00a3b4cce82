"""The count of what a rank holds: real processes, and rows that put two ranks beside what one promises."""

from __future__ import annotations

import subprocess

import pytest

from vlm.errors import RunError
from vlm.train import bench_zero


@pytest.fixture(scope="module")
def rows():
    return {row.name: row for row in bench_zero.rows()}


def test_two_ranks_hold_what_each_stage_promises(rows):
    assert len(rows) == 4 * 3
    ratios = {name: row.ratio for name, row in rows.items()}
    assert all(0.9 < ratios[name] < 1.1 for name, row in rows.items() if row.target == "0.9 to 1.1"), ratios
    assert all(ratio < 1.1 for ratio in ratios.values()), ratios


def test_what_is_counted_is_the_arithmetic_of_the_model(rows):
    """4 bytes a number for weights and for gradients, 8 for two moments, and 4 more for ZeRO's copy of the weights;
    on each of two ranks."""
    text = (p for name, p in bench_zero.deep_model().named_parameters() if name.startswith("language_model."))
    size = 4 * sum(parameter.numel() for parameter in text) / 2**20
    for stage, (weights, gradients, optimizer) in enumerate([(1, 1, 2), (1, 0.5, 1.5), (1, 0.5, 1.5), (0.5, 0.5, 1.5)]):
        found = [rows[f"zero {stage}: {part}"].ours / size for part in bench_zero.PARTS]
        assert found == pytest.approx([weights, gradients, optimizer], rel=0.1)


def test_failed_processes_are_told_in_one_line(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nMemoryError: 5 GiB\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RunError, match="^2 processes that count their memory failed: MemoryError: 5 GiB$"):
        bench_zero.measured(2)
