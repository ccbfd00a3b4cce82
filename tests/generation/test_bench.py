"""`vlm bench decode` on tiny shapes: every peer is asked for the same tokens, and the rows say what was measured."""

from __future__ import annotations

import json

import pytest
import torch

from vlm.cli import run
from vlm.generation import bench
from vlm.quantization import quantize

SMALL = {"WIDTH": 48, "DEPTH": 2, "HEADS": 2, "INNER": 64, "WORDS": 300, "NEW": 3, "BANDWIDTH_BYTES": 2**16}
TINY = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Shapes that take no time."""
    for name, value in SMALL.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "HALF_BILLION", bench.HALF_BILLION | TINY)


def test_rows_are_written(tmp_path, monkeypatch):
    # Two tokens of a tiny model take too little time to be told apart.
    monkeypatch.setattr(bench, "tokens_per_second", lambda seconds, rows: rows / seconds(rows, bench.NEW))
    with torch.compiler.set_stance("force_eager"):  # compiling takes longer than all the rest
        assert run(["bench", "decode", "--rounds", "1", "--out", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert len(rows) == 2 + 2 + 2 + 2 * 4 + 1  # int8 and int4 beside float32 in plain layers, and laid out
    assert all(row["ours"] > 0 and row["peer"] > 0 for row in rows)
    assert [row["target"] for row in rows[:2]] == ["≥ 1.4", "≥ 2.5"]


def test_another_peer_is_refused_by_name(capsys):
    assert run(["bench", "decode", "--against", "nobody"]) == 2
    assert (
        "vlm bench decode knows no 'nobody'; choose hf-idefics, hf-generate, hf-beams, fp32, bandwidth, llama.cpp"
        in capsys.readouterr().err
    )


def test_idefics_is_as_large_as_ours():
    """But for keys and values: both project the same image widths."""
    ours, peer = bench.composite(), bench.idefics()
    text = sum(weight.numel() for weight in ours.language_model.parameters())
    theirs = sum(weight.numel() for weight in peer.model.layers.parameters())
    assert text == pytest.approx(theirs + 2 * bench.WORDS * bench.WIDTH, rel=0.05)
    assert len(ours.adapters) == len(peer.model.gated_cross_attn_layers)


def test_weights_read_are_counted():
    model = bench.half_billion()
    text = model.language_model
    plain = sum(weight.numel() for weight in text.parameters())  # the head is the embedding, and is read as the head
    assert bench.weights_read(model) == 4 * plain
    linears = [module for module in text.modules() if isinstance(module, torch.nn.Linear)]
    rounded = sum(module.weight.numel() for module in linears)
    scales = sum(module.out_features for module in linears)
    kept = sum(
        w.numel()
        for m in text.modules()
        if not isinstance(m, torch.nn.Linear | torch.nn.Embedding)
        for w in m.parameters(False)
    )
    quantize(model, "int8")
    assert bench.weights_read(model) == rounded + 4 * (scales + kept)
