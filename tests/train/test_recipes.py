"""Every packaged recipe runs: a few steps at tiny sizes on generated data, to a model that loads and speaks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vlm
from vlm.data_tools.scenes import generate_scenes
from vlm.train.config import load_config, packaged_configs
from vlm.train.loop import train

TINY = [
    "vision.width=32",
    "vision.depth=1",
    "vision.heads=2",
    "text.width=32",
    "text.depth=2",
    "text.heads=2",
    "model.tokenizer.vocab_size=300",
]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """A few generated pictures."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    generate_scenes(folder, train=12, val=4, test=2)
    return folder


@pytest.fixture(scope="module")
def towers(tmp_path_factory, make_towers) -> dict[str, str]:
    """Tiny random checkpoints on disk, as timm and transformers save them."""
    return make_towers(tmp_path_factory.mktemp("towers"))


@pytest.mark.parametrize("name", sorted(packaged_configs()))
def test_recipe_runs(name, scenes, towers, tmp_path, make_picture):
    overrides = [f"data.train={scenes}/train", f"data.val={scenes}/val", "data.workers=0", f"out={tmp_path}"]
    for index, _ in enumerate(load_config(name, overrides).stages):
        overrides += [f"stages.{index}.steps=2", f"stages.{index}.batch=4", f"stages.{index}.micro_batch=2"]
    if name == "pretrained":
        overrides += [f"vision={towers['vision']}", f"text={towers['text']}"]
    else:
        overrides += TINY
    train(load_config(name, overrides))

    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [(line["stage"], line["step"]) for line in lines if "event" not in line]
    assert len(steps) == 4 and {stage for stage, _ in steps} == {0, 1}
    assert load_config(tmp_path / "config.yaml") == load_config(name, overrides), "the config as resolved"
    model = vlm.load(tmp_path / "model")
    assert isinstance(model.caption(make_picture(), max_new_tokens=3), str)
