"""Every packaged recipe runs: a few steps at tiny sizes on generated data, to a model that loads and speaks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

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
TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """A few generated pictures."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    generate_scenes(folder, train=12, val=4, test=2, processes=1)
    return folder


@pytest.fixture(scope="module")
def towers(tmp_path_factory, make_text_config, make_tokenizer) -> dict[str, str]:
    """Tiny random checkpoints on disk, as timm and transformers save them."""
    folder = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    for name in ("vision", "text"):
        (folder / name).mkdir()
    trunk = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY_VIT)
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": TINY_VIT, "pretrained_cfg": {}}
    (folder / "vision" / "config.json").write_text(json.dumps(config))
    save_file(trunk.state_dict(), folder / "vision" / "model.safetensors")
    AutoModelForCausalLM.from_config(make_text_config("llama")).save_pretrained(folder / "text")
    make_tokenizer().save_pretrained(folder / "text")
    return {name: str(folder / name) for name in ("vision", "text")}


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
