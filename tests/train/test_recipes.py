"""Every packaged recipe runs: a few steps at tiny sizes on generated data, to a model that loads and speaks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vlm
from vlm.data_tools.scenes import generate_scenes
from vlm.data_tools.text import Cutting, chunk
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


@pytest.fixture(scope="module")
def text(tmp_path_factory, towers) -> Path:
    """Blocks of text, long and short documents, as `vlm data text` writes them."""
    folder = tmp_path_factory.mktemp("text")
    for part, count in (("train", 30), ("val", 6)):
        lines = [{"text": "A sentence of the corpus. " * (1 + 7 * number % 5)} for number in range(count)]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        chunk([folder / f"{part}.jsonl"], folder / part, Cutting(towers["text"], 96, 16))
    return folder


@pytest.mark.parametrize("name", sorted(packaged_configs()))
def test_recipe_runs(name, scenes, text, towers, tmp_path, make_picture):
    data = text if name.startswith("text") else scenes
    overrides = [f"data.train={data}/train", f"data.val={data}/val", "data.workers=0", f"out={tmp_path}"]
    for index, _ in enumerate(load_config(name, overrides).stages):
        overrides += [f"stages.{index}.steps=2", f"stages.{index}.batch=4", f"stages.{index}.micro_batch=2"]
    if name == "pretrained":
        overrides += [f"vision={towers['vision']}", f"text={towers['text']}"]
    else:
        overrides += TINY
    config = load_config(name, overrides)
    train(config)

    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [(line["stage"], line["step"]) for line in lines if "event" not in line]
    assert steps == [(stage, step) for stage in range(len(config.stages)) for step in (1, 2)]
    assert load_config(tmp_path / "config.yaml") == load_config(name, overrides), "the config as resolved"
    model = vlm.load(tmp_path / "model")
    if not name.startswith("text"):
        assert isinstance(model.caption(make_picture(), max_new_tokens=3), str)
        return
    (last,) = [line for line in lines if line.get("event") == "validation"]
    assert last["perplexity"] > 1 and last["step"] == 2
    said = model.fill_mask("A <mask> of") if name == "text_mlm" else model.complete("A sentence", max_new_tokens=3)
    assert said


@pytest.mark.parametrize("choice", ["model.tokenizer.path", "text.family"])
def test_text_recipes_on_a_tokenizer_that_exists_and_on_a_decoder(choice, text, towers, tmp_path):
    chosen = {"model.tokenizer.path": ("text_clm", towers["text"]), "text.family": ("text_mlm", "qwen3")}
    name, value = chosen[choice]
    tiny = [setting for setting in TINY if not (choice.endswith("path") and "vocab_size" in setting)]
    few = ["stages.0.steps=1", "stages.0.batch=4", "precision=fp32", "data.workers=0"]
    train(load_config(name, [f"data.train={text}/train", f"out={tmp_path}", f"{choice}={value}", *tiny, *few]))
    assert vlm.load(tmp_path / "model").complete("A sentence", max_new_tokens=2) is not None
