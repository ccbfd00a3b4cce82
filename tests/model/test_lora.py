"""LoRA as `vlm.lora` promises it: born as nothing, merged without a trace, and on disk all of it or a clear refusal."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from models import logits
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import vlm
from vlm.lora import (
    add_lora,
    base_hash,
    has_lora,
    linear_layers,
    load_lora,
    merge_lora,
    remove_lora,
    save_lora,
    unmerge_lora,
)

KINDS = pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])  # Conv1D, grouped linears, an encoder
GATE = "adapters.1.attention_gate"


def trained(model: vlm.VLMModel, **options: object) -> vlm.VLMModel:
    """The model with updates that are no longer zero."""
    add_lora(model, r=4, **options)
    stir(model)
    return model


def stir(model: vlm.VLMModel) -> None:
    """Give the updates some value."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_magnitude" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def updated(model: vlm.VLMModel) -> set[str]:
    """Names of the linear layers of the language model that have an update."""
    names = [name for name, _ in model.language_model.named_modules() if name.endswith("lora_A.default")]
    return {name.removesuffix(".lora_A.default") for name in names}


@KINDS
def test_a_new_update_changes_no_bit(kind, make_model, batch):
    model = make_model(kind, gate_init=1.0)
    before = logits(model, batch)
    add_lora(model, r=4, dropout=0.5)
    assert has_lora(model) and torch.equal(logits(model.eval(), batch), before)


@KINDS
def test_the_updates_alone_train(kind, make_model, batch):
    model = make_model(kind, gate_init=1.0)
    layers = linear_layers(model)
    add_lora(model, r=2)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    learning = {name for name, parameter in model.language_model.named_parameters() if parameter.grad is not None}
    assert learning == {f"{layer}.lora_{side}.default.weight" for layer in layers for side in "AB"}


@KINDS
def test_the_head_takes_none(kind, make_model):
    model = make_model(kind)
    head = model.language_model.get_output_embeddings()
    add_lora(model, r=2)
    assert model.language_model.get_output_embeddings() is head
    assert not [name for name in updated(model) if model.language_model.get_submodule(name) is head]


@KINDS
def test_merged_is_the_same_model_under_the_old_names(kind, make_model, batch):
    model = make_model(kind, gate_init=1.0)
    names, born = list(model.state_dict()), logits(model, batch)
    trained(model)
    apart = logits(model, batch)
    assert (apart - born).abs().max() > 1e-2
    merge_lora(model)
    torch.testing.assert_close(logits(model, batch), apart, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == names and not has_lora(model)


@KINDS
def test_taken_out_nothing_is_left_of_it(kind, make_model, batch):
    model = make_model(kind)
    before, bare = {name: value.clone() for name, value in model.state_dict().items()}, logits(model, batch)
    trained(model, towers=("text", "vision"))
    assert has_lora(model) and not torch.equal(logits(model, batch), bare)
    remove_lora(model)
    assert not has_lora(model) and torch.equal(logits(model, batch), bare)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())


def test_after_a_merge_another_may_be_added(make_model, batch):
    model = trained(make_model(gate_init=1.0))
    merge_lora(model)
    merged = logits(model, batch)
    add_lora(model, r=2, targets=["q_proj"])
    assert torch.equal(logits(model, batch), merged)


@pytest.mark.parametrize(
    ("alpha", "rslora", "scale"), [(None, False, 2.0), (6.0, False, 1.5), (None, True, 4.0), (6.0, True, 3.0)]
)
def test_alpha_over_r_or_its_root_scales_the_update(alpha, rslora, scale, make_model):
    model = make_model("llama")
    add_lora(model, r=4, alpha=alpha, rslora=rslora, targets=["model.layers.1.self_attn.q_proj"])
    layer = model.language_model.model.layers[1].self_attn.q_proj
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.lora_B.default.weight.normal_()
    expected = before + scale * layer.lora_B.default.weight @ layer.lora_A.default.weight
    merge_lora(model)
    torch.testing.assert_close(model.language_model.model.layers[1].self_attn.q_proj.weight, expected)


@pytest.mark.parametrize(
    ("kind", "targets", "expected"),
    [
        ("llama", ["q_proj"], [f"model.layers.{n}.self_attn.q_proj" for n in range(3)]),
        ("llama", ["*.layers.0.mlp.*"], [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]),
        ("llama", ["model.layers.2.self_attn.o_proj"], ["model.layers.2.self_attn.o_proj"]),
        ("llama", ["q_proj", "*.0.self_attn.q_proj"], [f"model.layers.{n}.self_attn.q_proj" for n in range(3)]),
        ("gpt2", ["c_attn"], [f"transformer.h.{n}.attn.c_attn" for n in range(3)]),
        ("bert", ["*.layer.1.attention.self.*"], [f"bert.encoder.layer.1.attention.self.{n}" for n in ("query", "key", "value")]),
    ],
)  # fmt: skip
def test_targets_are_names_or_patterns(kind, targets, expected, make_model):
    model = make_model(kind)
    add_lora(model, r=2, targets=targets)
    assert updated(model) == set(expected)


@pytest.mark.parametrize("target", ["q_porj", "proj", "lm_head", "*.layers.9.*", ""])
def test_a_target_that_matches_nothing_is_refused(target, make_model):
    model = make_model("llama")
    with pytest.raises(vlm.UsageError) as refusal:
        add_lora(model, r=2, targets=["q_proj", target])
    assert f"lora target {target!r} matches none of 21 linear layers" in str(refusal.value)
    assert "'down_proj', 'gate_proj'" in str(refusal.value) and "\n" not in str(refusal.value)
    assert not has_lora(model)


# Variants

VARIANTS = pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"dora": True}),
        ("gpt2", {"dora": True, "rslora": True}),
        ("qwen2", {"towers": ["text", "vision"]}),
        ("bert", {"towers": ["vision"], "dora": True}),
    ],
)


@VARIANTS
def test_variants_are_born_as_nothing_merge_and_come_off_again(kind, options, make_model, batch):
    model = make_model(kind, gate_init=1.0)
    names, before = list(model.state_dict()), logits(model, batch)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    add_lora(model, r=4, **options)
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-5, atol=1e-6)
    stir(model)
    apart = logits(model, batch)
    assert (apart - before).abs().max() > 1e-3
    merge_lora(model, keep=True)
    torch.testing.assert_close(logits(model, batch), apart, rtol=1e-5, atol=1e-5)
    unmerge_lora(model)
    assert torch.allclose(logits(model, batch), apart, rtol=1e-4, atol=1e-5)
    for name, value in model.state_dict().items():
        if "lora_" not in name:
            torch.testing.assert_close(value, weights[name.replace("base_layer.", "")], rtol=1e-5, atol=1e-6)
    merge_lora(model)
    torch.testing.assert_close(logits(model, batch), apart, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == names and not has_lora(model)


@VARIANTS
def test_variants_are_saved_and_come_back_exactly(kind, options, make_model, batch, tmp_path):
    model = make_model(kind, gate_init=1.0)
    base = base_hash(model.state_dict())
    trained(model, **options)
    save_lora(model, tmp_path / "adapter", base, {})
    written = {str(path.relative_to(tmp_path / "adapter")) for path in tmp_path.rglob("adapter_model.safetensors")}
    places = {"text": "adapter_model.safetensors", "vision": "vision/adapter_model.safetensors"}
    assert written == {places[tower] for tower in options.get("towers", ["text"])}
    again = make_model(kind, gate_init=1.0)
    load_lora(again, tmp_path / "adapter")
    assert torch.equal(logits(again.eval(), batch), logits(model, batch))


def test_dora_is_its_formula(make_model):
    """Liu et al. 2024, equation 5: a length for each output times the direction of the updated weight."""
    model = make_model("llama")
    add_lora(model, r=4, targets=["model.layers.1.self_attn.q_proj"], dora=True)
    stir(model)
    layer = model.language_model.model.layers[1].self_attn.q_proj
    direction = layer.base_layer.weight + 2.0 * layer.lora_B.default.weight @ layer.lora_A.default.weight
    length = layer.lora_magnitude_vector.default.weight
    expected = length[:, None] * direction / direction.norm(dim=1, keepdim=True)
    merge_lora(model)
    torch.testing.assert_close(model.language_model.model.layers[1].self_attn.q_proj.weight, expected)


@pytest.mark.parametrize("language", ["llama", "gpt2"])
def test_peft_reads_a_dora_folder(language, make_model, batch, tmp_path):
    from peft import PeftModel

    ours = trained(make_model(language), dora=True)
    save_lora(ours, tmp_path / "adapter", "", {})
    theirs = PeftModel.from_pretrained(make_model(language).language_model, str(tmp_path / "adapter")).eval()
    words = {"input_ids": batch["input_ids"]}
    with torch.no_grad():
        assert torch.equal(theirs(**words).logits, ours.eval().language_model(**words).logits)


def test_a_vision_tower_takes_updates_where_its_pictures_pass(make_model):
    tiny = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    plain = make_model("llama")
    layers = [f"trunk.blocks.{n}.{name}" for n in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert linear_layers(plain, "vision") == layers
    eva = {"name": "timm:eva02_tiny_patch14_224", "image_size": (32, 32), "kwargs": tiny}
    past = make_model("llama", vision=eva)
    names = {name for name, module in past.vision.named_modules() if isinstance(module, torch.nn.Linear)}
    skipped = names - set(linear_layers(past, "vision"))
    assert skipped == {"trunk.blocks.0.attn.q_proj"} or skipped == {"trunk.blocks.0.attn.qkv"}


def test_a_tower_that_no_target_names_is_refused(make_model):
    model = make_model("llama")
    with pytest.raises(
        vlm.UsageError, match="targets .'q_proj'. match none of 8 linear layers of tower vision; .*'qkv'"
    ):
        add_lora(model, r=2, targets=["q_proj"], towers=["text", "vision"])
    assert not has_lora(model)
    add_lora(model, r=2, targets=["q_proj", "qkv"], towers=["text", "vision"])
    assert has_lora(model)


# On disk


@pytest.fixture
def saved(make_model, tmp_path) -> Path:
    """The adapter folder of a tiny llama, with a gate that was trained too."""
    model = make_model("llama", gate_init=1.0)
    base = base_hash(model.state_dict())
    trained(model, targets=["q_proj", "down_proj"])
    save_lora(model, tmp_path / "adapter", base, {GATE: torch.full_like(model.state_dict()[GATE], 0.25)})
    return tmp_path / "adapter"


@KINDS
def test_what_is_saved_comes_back_exactly(kind, make_model, batch, tmp_path):
    model = make_model(kind, gate_init=1.0)
    base = base_hash(model.state_dict())
    trained(model)
    with torch.no_grad():
        model.get_parameter(GATE).fill_(0.25)
    save_lora(model, tmp_path / "adapter", base, {GATE: model.get_parameter(GATE)})
    again = make_model(kind, gate_init=1.0)
    load_lora(again, tmp_path / "adapter")
    assert torch.equal(logits(again.eval(), batch), logits(model, batch))


def test_peft_reads_the_folder(saved, make_model, batch):
    from peft import PeftModel

    ours = make_model("llama", gate_init=1.0)
    load_lora(ours, saved)
    theirs = PeftModel.from_pretrained(make_model("llama", gate_init=1.0).language_model, str(saved)).eval()
    words = {"input_ids": batch["input_ids"]}
    with torch.no_grad():
        assert torch.equal(theirs(**words).logits, ours.eval().language_model(**words).logits)


def test_a_hash_knows_names_shapes_and_values_and_no_order_or_dtype():
    weights = {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    same = {"b": torch.ones(2), "a": torch.arange(6.0)}
    others = [
        {"c": torch.arange(6.0), "b": torch.ones(2)},
        {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)},
        {"a": torch.arange(6.0), "b": torch.tensor([1.0, 1.0001])},
    ]
    assert base_hash(weights) == base_hash(same)
    assert len({base_hash(one) for one in [weights, *others]}) == 4


def test_another_base_is_refused_by_its_hash(saved, make_model):
    other = make_model("llama", gate_init=1.0, seed=1)
    found, wanted = base_hash(other.state_dict())[:12], json.loads((saved / "base.json").read_text())["sha256"][:12]
    with pytest.raises(vlm.UsageError, match=f"with weights {wanted}…, this one has {found}…; load it onto") as refusal:
        load_lora(other, saved)
    assert "\n" not in str(refusal.value) and not has_lora(other)


def changed(folder: Path, file: str, change) -> None:
    weights = load_file(folder / file)
    change(weights)
    save_file(weights, folder / file, metadata={"format": "pt"})


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
UPDATES = "adapter_model.safetensors"


def other_rank(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: changed(f, UPDATES, lambda w: w.pop(FIRST)), "holds 11 updates and the model takes 12; they differ in"),
        (lambda f: changed(f, UPDATES, lambda w: w.update(extra=torch.ones(1))), "holds 13 updates and the model takes 12"),
        (lambda f: changed(f, "trained.safetensors", lambda w: w.update(x=torch.ones(1))), "holds x, which this model has"),
        (other_rank, "weights of other shapes"),
        (lambda f: os.truncate(f / UPDATES, 100), "is no adapter folder"),
        (lambda f: (f / "trained.safetensors").unlink(), "is no adapter folder"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "is no adapter folder"),
        (lambda f: (f / "base.json").write_text("[]"), "is no adapter folder"),
        (lambda f: (f / "base.json").unlink(), "is no adapter folder"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused_in_one_line(damage, message, saved, make_model):
    damage(saved)
    with pytest.raises(vlm.UsageError) as refusal:
        load_lora(make_model("llama", gate_init=1.0), saved)
    assert message in str(refusal.value) and str(saved) in str(refusal.value) and "\n" not in str(refusal.value)


def test_an_empty_shard_is_never_saved(make_model, tmp_path):
    model = trained(make_model())
    with pytest.raises(vlm.RunError, match=f"1 of 43 adapter weights are empty, the first {GATE}; not saved"):
        save_lora(model, tmp_path / "adapter", "", {GATE: torch.empty(0)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [SafetensorError("I/O error: No space left on device"), OSError(28, "No space left")])
def test_a_disk_that_runs_full_leaves_nothing(error, make_model, monkeypatch, tmp_path):
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        if path.name == "trained.safetensors":
            raise error

    model = trained(make_model())
    monkeypatch.setattr("vlm.lora.save_file", full)
    with pytest.raises(vlm.RunError, match="adapter: .*No space left.*; free the disk") as failure:
        save_lora(model, tmp_path / "adapter", "", {})
    assert "\n" not in str(failure.value) and not list(tmp_path.iterdir())
