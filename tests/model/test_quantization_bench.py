"""What `vlm bench kernels` times is the product that it names."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from vlm import quantization_bench as bench
from vlm.cli import run


@pytest.mark.parametrize("name", list(bench.CANDIDATES))
def test_every_candidate_is_the_same_layer(name):
    torch.manual_seed(0)
    linear, x = nn.Linear(128, 64, bias=False).requires_grad_(False), torch.randn(8, 128)
    if "bf16" not in name and "int4" not in name:
        x[3] *= 1e3  # one loud row spoils no other
    error = (bench.CANDIDATES[name](linear)(x).float() - linear(x)).norm(dim=1) / linear(x).norm(dim=1)
    assert (error < (0.15 if "int4" in name else 0.02)).all(), error


def test_rows_are_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "SHAPES", ((64, 64),))
    monkeypatch.setattr(bench, "COLD_BYTES", 2**15)
    assert run(["bench", "kernels", "--rounds", "1", "--out", str(tmp_path / "kernels.json")]) == 0
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [name for name in bench.CANDIDATES for _ in bench.ROWS]
    assert all(row["ours"] > 0 and row["peer"] > 0 for row in rows)
