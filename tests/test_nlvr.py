"""Sentences and judgements by people, end to end: convert, train, evaluate. A few pairs and steps: the way is tested.

The data is NLVR (Suhr et al., ACL 2017, CC-BY-4.0), which lies beside the checkout and is not part of it.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from vlm.cli import run

ARCHIVE = Path(__file__).parents[2] / "shared" / "data" / "nlvr.tar.xz"
TINY = "vision.width=32 vision.depth=1 vision.heads=2 text.width=32 text.depth=1 text.heads=2 model.embedding_dim=16"
FEW = "stages.0.steps=2 stages.0.batch=8 stages.1.steps=2 stages.1.batch=8 data.workers=0"


@pytest.mark.skipif(
    not ARCHIVE.is_file(), reason="the NLVR pairs are not beside the checkout (shared/data/nlvr.tar.xz)"
)
def test_nlvr_from_the_archive_to_a_score(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    for split, pairs in (("train", 400), ("dev", 200)):
        lines = Path(f"nlvr/{split}.jsonl").read_text().splitlines(keepends=True)
        Path(f"nlvr/{split}.jsonl").write_text("".join(lines[:pairs]))
        assert run(["data", "convert", f"nlvr/{split}.jsonl", f"shards/{split}", "--format", "jsonl"]) == 0
    assert "shards/train: 400 samples" in capsys.readouterr().out
    assert run(["data", "inspect", "shards/dev"]) == 0
    data = ["data.train=shards/train", "data.val=shards/dev", "out=run"]
    assert run(["train", "nlvr", *data, *TINY.split(), *FEW.split()]) == 0
    assert run(["eval", "run/model", "vqa", "--data", "shards/dev", "--out", "run/eval"]) == 0
    vqa = json.loads(Path("run/eval/results.json").read_text())["tasks"]["vqa"]
    assert vqa["n"] == 200 and 0 <= vqa["accuracy"] <= 1 and {"blind", "shuffled"} <= set(vqa)
    answers = [json.loads(line)["answer"] for line in Path("nlvr/dev.jsonl").read_text().splitlines()]
    assert vqa["majority"] == max(answers.count("yes"), answers.count("no")) / len(answers), "what is to be beaten"
