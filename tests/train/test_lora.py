"""Whole runs with LoRA: what trains, what the adapter's folder holds, and that it fits its base and no other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from model_weights import same, weights_of
from safetensors.torch import load_file, save_file

from vlm.errors import UsageError
from vlm.lora import load_lora, merge_lora
from vlm.saving import read
from vlm.train import loop
from vlm.train.log import RunLog

LORA = {"objective": "joint", "steps": 3, "lr": 0.01, "lora": {"r": 2}}


@pytest.mark.parametrize("language", ["qwen3", "gpt2"])
def test_lora_moves_linear_layers_of_the_language_model_alone(run, save_model, tmp_path, language):
    base = save_model(tmp_path / "base", language, gate_init=0.5)
    left = run(LORA | {"freeze": ["vision", "adapters"]}, model={"path": base})
    before, after = weights_of(base), left.weights()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed
    assert all(name.startswith("language_model.") and name.endswith("weight") for name in changed)
    assert not any(word in name for name in changed for word in ("embed", "lm_head", "norm", "wte", "wpe", "ln_"))


@pytest.mark.parametrize(("language", "freeze"), [("qwen3", []), ("gpt2", ["vision", "adapters"])])
def test_the_base_with_its_adapter_is_the_merged_model(run, save_model, tmp_path, language, freeze):
    base = save_model(tmp_path / "base", language, gate_init=0.5)
    left = run(LORA | {"freeze": freeze}, model={"path": base})
    model, _ = read(base)
    merged, _ = read(left.out / "model")
    ids, pixels = torch.tensor([[3, 40, 50, 60]]), torch.randn(1, 3, 32, 32)
    alone = model(ids, pixel_values=pixels).logits
    load_lora(model, left.out / "adapter")
    model.eval()
    expected = merged(ids, pixel_values=pixels).logits
    assert torch.allclose(model(ids, pixel_values=pixels).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone, expected, rtol=1e-3, atol=1e-3)
    merge_lora(model)
    assert same(model.state_dict(), merged.state_dict(), rtol=1e-5, atol=1e-6)


def test_an_adapter_brings_its_matching_head_to_a_base_without_one(run, base):
    left = run(LORA | {"contrastive_weight": 0.1, "matching_weight": 0.5})
    model, _ = read(base)
    assert model.matching_head is None
    load_lora(model, left.out / "adapter")
    merge_lora(model)
    merged = left.weights()
    assert "matching_head.weight" in merged and same(model.state_dict(), merged, rtol=1e-5, atol=1e-6)


def test_lora_on_both_towers_under_zero_3_is_that_of_one_process(run, base):
    """With nothing held whole: dora reads weights past their layers."""
    stage = LORA | {"steps": 3, "lora": {"r": 2, "dora": True, "rslora": True, "towers": ["text", "vision"]}}
    split = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    plain, left = run(stage, into="plain"), run(stage, zero=3, deepspeed=split)
    assert np.allclose(left.losses, plain.losses, rtol=1e-4)
    assert same(left.weights(), plain.weights(), rtol=1e-2, atol=1e-4)
    model, _ = read(base)
    before = model.state_dict()
    moved = {name for name, value in left.weights().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("vision.trunk.blocks") for name in moved) and "vision.trunk.pos_embed" not in moved
    load_lora(model, left.out / "adapter")
    merge_lora(model)
    assert same(model.state_dict(), left.weights(), rtol=1e-4, atol=1e-6)
    files = [load_file(path) for path in (left.out / "adapter").rglob("*.safetensors")]
    sizes = [value.nbytes for file in files for value in file.values()]
    assert len(files) == 3 and min(sizes) > 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_log_says_what_trains_and_what_it_takes(run, base, monkeypatch, optimizer):
    """Beside the optimizer's own tensors, and those in the adapter folder."""
    kept: list[int] = []
    said: list[str] = []
    monkeypatch.setattr(RunLog, "say", lambda log, text: said.append(text))

    def seen(engine, *given):
        states = engine.optimizer.state.values()
        tensors = [value for state in states for value in state.values() if torch.is_tensor(value) and value.ndim]
        kept.append(sum(value.nbytes for value in tensors))
        return leave(engine, *given)

    leave = loop.full_weights
    monkeypatch.setattr(loop, "full_weights", seen)
    left = run(LORA | {"optimizer": optimizer, "lora": {"r": 2, "dora": True}, "freeze": ["vision"]})
    files = [load_file(path) for path in (left.out / "adapter").rglob("*.safetensors")]
    tensors = [value for file in files for value in file.values()]
    trains, held = sum(value.numel() for value in tensors), sum(value.nbytes for value in tensors)
    whole = sum(parameter.numel() for parameter in read(base)[0].parameters())
    total = whole + sum(
        value.numel() for value in load_file(left.out / "adapter" / "adapter_model.safetensors").values()
    )
    words = f"trains {trains:,} of {total:,} parameters; optimizer state {kept[0]:,} bytes; adapter {held:,} bytes"
    assert any(words in text for text in said), said


def test_an_adapter_refuses_another_base(run, make_model, base):
    left = run(LORA)
    with pytest.raises(UsageError, match="belongs to a model with weights .* load it onto .*stage0-start.model"):
        load_lora(make_model(gate_init=0.5, seed=1), left.out / "adapter")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "trained.safetensors"])
def test_an_adapter_is_loaded_whole_or_not_at_all(run, base, file):
    left = run(LORA)
    path = left.out / "adapter" / file
    tensors = load_file(path)
    name = min(tensors)
    save_file({key: value for key, value in tensors.items() if key != name} | {"extra." + name: tensors[name]}, path)
    with pytest.raises(UsageError, match="holds"):
        load_lora(read(base)[0], left.out / "adapter")
    path.unlink()
    with pytest.raises(UsageError, match="is no adapter folder"):
        load_lora(read(base)[0], left.out / "adapter")


def test_frozen_weights_stay_in_full_where_the_engine_holds_them_in_half(run, save_model, tmp_path):
    """Tied embeddings too, which have two names."""
    base = save_model(tmp_path / "base", "qwen2", gate_init=0.5)
    stage = LORA | {"freeze": ["vision"]}
    left = run(stage, model={"path": base}, precision="bf16", zero=2, deepspeed={"bf16": {"enabled": True}})
    before, after = weights_of(base), weights_of(left.out / "model")
    frozen = [name for name in before if name.startswith("vision.") or "embed" in name or "lm_head" in name]
    assert all(torch.equal(before[name], after[name]) for name in frozen)


def test_an_adapter_names_the_base_that_a_stage_before_has_made(run, base, tmp_path):
    left = run({"objective": "joint", "steps": 1}, LORA)
    start = left.out / "checkpoints" / "stage1-start" / "model"
    with pytest.raises(UsageError, match=f"belongs to a model with weights .*; load it onto {start}$"):
        load_lora(read(base)[0], left.out / "adapter")
    model, _ = read(start)
    load_lora(model, left.out / "adapter")
    merge_lora(model)
    assert same(model.state_dict(), left.weights(), rtol=1e-5, atol=1e-6)


def test_an_adapter_fits_the_positions_that_it_was_trained_with(run, base):
    scaled = {"path": base, "rope_scaling": {"type": "linear", "factor": 4.0}}
    left = run(LORA, model=scaled)
    with pytest.raises(UsageError, match="was trained with rotary positions .*'linear'.*, this model has .*'default'"):
        load_lora(read(base)[0], left.out / "adapter")
    load_lora(read(left.out / "checkpoints" / "stage0-start" / "model")[0], left.out / "adapter")


def test_no_adapter_is_left_of_a_stage_that_others_followed(run):
    left = run(LORA, {"objective": "joint", "steps": 1})
    assert not (left.out / "adapter").exists() and (left.out / "model").is_dir()


def test_a_stage_after_lora_goes_on_from_the_merged_model(run):
    left = run(LORA, {"objective": "joint", "steps": 1})
    start = weights_of(left.out / "checkpoints" / "stage1-start" / "model")
    assert start.keys() == left.weights().keys() and not any("lora" in name for name in start)
