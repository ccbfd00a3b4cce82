"""`vlm bench eval`: both sides put the same prompts. How fast they are, is not asserted here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlm.api import VLM
from vlm.benchmark import Row
from vlm.cli import run as cli
from vlm.data_tools.scenes import generate_scenes
from vlm.errors import UsageError
from vlm.eval.bench import bench_eval
from vlm.saving import save
from vlm.shards import ShardWriter


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_model, make_processor) -> Path:
    """A folder with `scenes` and a `model`."""
    folder = tmp_path_factory.mktemp("bench")
    generate_scenes(folder / "scenes", train=1, val=1, test=4)
    save(make_model(gate_init=0.5), make_processor(), folder / "model")
    return folder


def test_both_sides_put_the_same_prompts(folder: Path, monkeypatch) -> None:
    asked: dict[str, list[Any]] = {"generate": [], "generate_each": []}
    for name, put in (("generate", VLM.generate), ("generate_each", VLM.generate_each)):

        def watched(model: VLM, conversations: Any, name: str = name, put: Any = put, **options: Any) -> Any:
            conversations = list(conversations)
            turns = [
                [part.get("text") or part["image"].tobytes() for part in turn["content"]] for (turn,) in conversations
            ]
            asked[name].append((turns, options))
            return put(model, conversations, **options)

        monkeypatch.setattr(VLM, name, watched)
    (row,) = bench_eval(folder / "model", folder / "scenes" / "test", batch=4, limit=3, rounds=2)
    assert len(asked["generate"]) == 3 and len(asked["generate_each"]) == 2
    assert all(one == asked["generate"][0] for one in asked["generate"] + asked["generate_each"])
    assert isinstance(row, Row) and row.ours > 0 and row.peer and row.ratio == row.ours / row.peer
    assert row.conditions.startswith(f"{len(asked['generate'][0][0])} questions on 3 samples of ")


def test_the_command_writes_its_row(folder: Path, tmp_path: Path, capsys) -> None:
    arguments = ["bench", "eval", str(folder / "model"), "--data", str(folder / "scenes" / "test")]
    assert cli([*arguments, "--limit", "1", "--rounds", "1", "--out", str(tmp_path / "rows.json")]) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text("utf-8"))["rows"]
    assert row["name"] == "vlm eval, vqa" and row["ratio"] > 0 and "vlm eval, vqa" in capsys.readouterr().out


def test_data_without_questions_is_refused(folder: Path, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "data") as writer:
        writer.write("a", {"txt": b"no picture"})
    with pytest.raises(UsageError, match="no questions about images in the first 64 samples; give other data"):
        bench_eval(folder / "model", tmp_path / "data")
