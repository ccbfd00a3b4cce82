"""LoRA beside a base in int8 or int4: it learns, the base does not move, and what is left is whole; else it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import vlm
from vlm.errors import UsageError
from vlm.lora import add_lora, load_lora
from vlm.quantization import chosen, is_quantized, quantize
from vlm.quantized_linear import Int4Linear, Int8Linear
from vlm.saving import read
from vlm.train import loop
from vlm.train.config_stage import Stage
from vlm.train.flops import ModelFlops
from vlm.train.log import RunLog
from vlm.train.objectives import OBJECTIVES
from vlm.train.optimization import choose_trainable

LORA = {"objective": "joint", "steps": 6, "lr": 0.01, "lora": {"r": 2}}
IDS, PIXELS = torch.tensor([[3, 40, 50, 60]]), torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)


def logits(model) -> torch.Tensor:
    """By plain attention, as training on a CPU computes it."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model.eval()(IDS, pixel_values=PIXELS).logits


def rounded(path: str, scheme: str = "int8"):
    """The model of a folder as it is held while LoRA learns."""
    model, _ = read(path, dtype="float32")
    quantize(model, scheme, base=True)
    return model


@pytest.fixture
def seen(monkeypatch) -> list[dict]:
    """What the engine holds at the end of each stage: its state, its quantized layers and its logits, where it can be asked."""
    kept: list[dict] = []
    collect = loop.full_weights

    def watched(engine, frozen):
        model = engine.module.model
        kinds = (".weight_int8", ".weight_scale")
        plain = {name: value.clone() for name, value in model.state_dict().items() if name.endswith(kinds)}
        answer = logits(model) if engine.zero_optimization_stage() < 3 else None
        kept.append({"base": plain, "logits": answer})
        return collect(engine, frozen)

    monkeypatch.setattr(loop, "full_weights", watched)
    return kept


def test_the_loss_falls_and_the_base_does_not_move_however_it_is_sharded(run, base, seen):
    stage = LORA | {"batch": 12, "lr": 0.05, "freeze": ["vision", "adapters"]}
    before = rounded(base).state_dict()
    losses = []
    for zero in (0, 1, 2, 3):
        left = run(stage, into=f"{zero}", model={"path": base, "quantize": "int8"}, zero=zero)
        losses.append(left.losses)
        held = {name.replace(".base_layer", ""): value for name, value in seen[-1]["base"].items()}
        assert len(held) == 2 * 3 * 7 and all(torch.equal(value, before[name]) for name, value in held.items())
        loaded = vlm.load(base, adapter=left.out / "adapter").model
        assert is_quantized(loaded) and (zero == 3 or torch.equal(logits(loaded), seen[-1]["logits"]))
        assert all(value.numel() for value in load_file(left.out / "adapter" / "adapter_model.safetensors").values())
    assert losses[0][-1] < losses[0][0] - 0.1 and np.allclose(losses, losses[:1], rtol=1e-5)


@pytest.mark.parametrize(("scheme", "kind"), [("int8", Int8Linear), ("int4", Int4Linear)])
def test_what_is_left_is_the_full_precision_base_with_the_update(run, base, seen, scheme, kind):
    stage = LORA | {"freeze": ["vision", "adapters"], "lora": {"r": 2, "alpha": 6}}
    left = run(stage, model={"path": base, "quantize": scheme}, precision="bf16")
    before, after = read(base)[0].state_dict(), left.weights()
    updates = load_file(left.out / "adapter" / "adapter_model.safetensors")
    for name, value in before.items():
        down = updates.get(
            f"base_model.model.{name.removeprefix('language_model.').removesuffix('.weight')}.lora_A.weight"
        )
        if down is None:
            assert torch.equal(after[name], value), name
        else:
            up = updates[
                f"base_model.model.{name.removeprefix('language_model.').removesuffix('.weight')}.lora_B.weight"
            ]
            torch.testing.assert_close(after[name].double(), value.double() + 3 * up.double() @ down.double())
            assert not torch.equal(after[name], value), name
    assert before.keys() == after.keys() and not is_quantized(read(left.out / "model")[0])
    loaded = vlm.load(base, adapter=left.out / "adapter", quantize=scheme).model
    assert any(isinstance(module, kind) for module in loaded.modules())
    assert torch.equal(logits(loaded), seen[0]["logits"])
    told = json.loads((left.out / "adapter" / "base.json").read_text())
    assert told["quantization"] == {"scheme": scheme, "vision": False, "base": True} and len(told["sha256"]) == 64


@pytest.mark.parametrize(
    ("language", "stage", "fields"),
    [
        ("qwen2", {"lora": {"r": 2, "towers": ["text", "vision"], "rslora": True}}, {"zero": 3}),
        ("gpt2", {"lora": {"r": 2, "dora": True}}, {"gradient_checkpointing": True, "zero": 3, "precision": "bf16"}),
        ("qwen3_moe", {"lora": {"r": 2}, "ema": 0.5, "optimizer": "muon"}, {"zero": 2}),
        ("bert", {"objective": "mlm", "lora": {"r": 2}}, {}),
        ("llama", {"objective": "contrastive", "lora": {"r": 2}, "micro_batch": 2}, {"zero": 1}),
        ("llama", {"objective": "clm", "lora": None, "freeze": ["*_proj.weight"]}, {}),
    ],
)
def test_families_updates_and_objectives(run, save_model, tmp_path, language, stage, fields):
    base = save_model(tmp_path / "base", language, gate_init=0.5)
    left = run(LORA | {"steps": 2} | stage, model={"path": base, "quantize": "int8"}, **fields)
    before, after = read(base)[0].state_dict(), left.weights()
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)


def test_pretrained_towers_whose_weights_the_engine_holds_in_half(run, make_towers, tmp_path):
    """What did not train is as it was in their files, though the engine has it in bf16."""
    towers = make_towers(tmp_path)
    model = {**towers, "quantize": "int8", "adapter": {"gate_init": 0.5}, "embedding_dim": 16}
    stage = LORA | {"steps": 2, "freeze": ["vision"]}
    left = run(stage, stage, model=model, precision="bf16", zero=2, deepspeed={"bf16": {"enabled": True}})
    after = left.weights()
    text = load_file(Path(towers["text"]) / "model.safetensors")
    tower = load_file(Path(towers["vision"]) / "model.safetensors")
    embeddings = after["language_model.model.embed_tokens.weight"]
    assert torch.equal(embeddings[: len(text["model.embed_tokens.weight"])], text["model.embed_tokens.weight"])
    assert all(torch.equal(after[f"vision.trunk.{name}"], value) for name, value in tower.items())
    moved = "model.layers.0.self_attn.q_proj.weight"
    assert 0 < (after[f"language_model.{moved}"] - text[moved]).abs().max() < 0.1


def told(left) -> list[dict]:
    """The steps' lines without the clock."""
    clock = ("seconds", "samples_per_second", "tokens_per_second", "mfu", "memory_gib")
    return [{name: value for name, value in line.items() if name not in clock} for line in left.steps]


STATES = "stage0-step2", "stage1-start", "stage1-step2"


@pytest.mark.parametrize(("zero", "precision", "states"), [(0, "fp32", STATES), (3, "bf16", STATES[2:])])
def test_a_resumed_run_is_the_straight_one(run, save_model, tmp_path, zero, precision, states):
    """In the second stage too, whose base is what the first has left, quantized anew."""
    base = save_model(tmp_path / "base", "gpt2", gate_init=0.5)
    stage = LORA | {"steps": 3, "lora": {"r": 2, "dropout": 0.3}, "ema": 0.6}
    fields = {"zero": zero, "precision": precision, "model": {"path": base, "quantize": "int8"}}
    fields |= {"checkpoint": {"every": 2}}
    straight = run(stage, stage, into="straight", **fields)
    for number, state in enumerate(states):
        copy = tmp_path / f"{number}"
        shutil.copytree(straight.out, copy)
        shutil.rmtree(copy / "model")
        (copy / "checkpoints" / "latest").write_text(state + "\n")
        resumed = run(stage, stage, into=copy.name, resume=True, **fields)
        assert told(resumed)[-1] == told(straight)[-1]
        weights = straight.weights()
        assert all(torch.equal(weights[name], value) for name, value in resumed.weights().items())
    start = straight.out / "checkpoints" / "stage1-start" / "model"
    model = vlm.load(start, adapter=straight.out / "adapter").model
    assert is_quantized(model) and not torch.equal(logits(model), logits(rounded(str(start))))


def test_the_log_says_what_the_base_takes(run, base, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(RunLog, "say", lambda log, text: said.append(text))
    run(LORA | {"steps": 1}, model={"path": base, "quantize": "int4"})
    model = rounded(base, "int4")
    layers = [module for module in model.modules() if isinstance(module, Int8Linear | Int4Linear)]
    held = sum(layer.values.nbytes + layer.scales.nbytes for layer in layers)
    full = sum(module.weight.nbytes for _, module in chosen(read(base)[0], base=True))
    words = f"; {len(layers)} quantized layers {held:,} bytes, {held / full:.2f} of float32"
    row = next(line for line in said[0].splitlines() if line.startswith("language_model")).split()
    whole = sum(parameter.numel() for parameter in read(base)[0].language_model.parameters())
    updates = 2 * sum(layer.in_features + layer.out_features for layer in layers)
    assert row[1] == f"{whole + updates:,}" and words in said[0], said[0]


def test_a_weight_in_few_bits_is_as_much_arithmetic(make_model):
    costs = []
    for scheme in (None, "int8"):
        model = make_model("qwen2")
        if scheme is not None:
            quantize(model, scheme, base=True)
        add_lora(model, r=2)
        stage = Stage(objective="joint", steps=1, lora={"r": 2})
        objective = OBJECTIVES["joint"](model, stage)
        choose_trainable(objective, stage)
        costs.append(ModelFlops(objective).body)
    assert costs[0] == costs[1] and costs[0].trainable > 0


def test_the_best_is_kept_in_full(run, base, pairs):
    keeping = {"data": {"val": pairs}, "validation": {"every": 1, "samples": 4, "keep_best": True}}
    left = run(LORA | {"steps": 2}, model={"path": base, "quantize": "int8"}, **keeping)
    best, last = (read(left.out / name)[0] for name in ("best", "model"))
    assert not is_quantized(best)
    assert all(torch.equal(value, last.state_dict()[name]) for name, value in best.state_dict().items())


def test_an_adapter_of_a_quantized_base_is_not_put_onto_another(run, base, save_model, tmp_path):
    left = run(LORA | {"steps": 1}, model={"path": base, "quantize": "int8"})
    with pytest.raises(UsageError, match="belongs to a model with weights"):
        load_lora(rounded(base), left.out / "adapter")
    with pytest.raises(UsageError, match="quantized to int8 already"):
        vlm.load(base, adapter=left.out / "adapter", quantize="int4")


# What is refused


@pytest.mark.parametrize(
    ("stages", "fields", "words"),
    [
        (
            [{}],
            {},
            r"stages.0 trains 21 of 21 layers that model.quantize int8 freezes, the first language_model.model.*q_proj",
        ),
        (
            [LORA, {"objective": "clm", "freeze": ["*.mlp.*"]}],
            {},
            r"stages.1 trains 12 of 21 layers .* freeze: \[language_model",
        ),
        ([{"lora": {"r": 2, "towers": ["vision"]}}], {}, r"stages.0 trains 21 of 21 layers .* give it lora: \{r: 8\}"),
        ([LORA], {"tensor_parallel": 2}, "model.quantize int8 needs whole matrices, which tensor_parallel 2 cuts up"),
        ([LORA], {"compile": True}, "model.quantize int8 runs uncompiled, and compile is on; change one"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_step(run, base, tmp_path, stages, fields, words):
    listed = [{"objective": "joint", "steps": 1} | stage for stage in stages]
    with pytest.raises(UsageError, match=words) as caught:
        run(*listed, model={"path": base, "quantize": "int8"}, **fields)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_frozen_language_model_needs_no_lora(run, base):
    left = run({"objective": "joint", "freeze": ["language_model"]}, model={"path": base, "quantize": "int8"})
    before, after = read(base)[0].state_dict(), left.weights()
    moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"vision", "adapters"} and not (left.out / "adapter").exists()


def test_a_base_that_changes_meanwhile(run, base, tmp_path, monkeypatch):
    """What did not train comes from what the run began with, whatever has become of the folder."""
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(base, elsewhere)
    collect = loop.full_weights

    def replaced(engine, frozen):
        shutil.rmtree(elsewhere)
        return collect(engine, frozen)

    monkeypatch.setattr(loop, "full_weights", replaced)
    left = run(LORA, model={"path": str(elsewhere), "quantize": "int8"}, into="other")
    head = "language_model.lm_head.weight"
    assert torch.equal(left.weights()[head], read(base)[0].state_dict()[head]) and not elsewhere.exists()
