"""Quantization: rounded weights against float64, rows that do not touch each other, every module accounted for, folders that
come back bit for bit, and LoRA on a base that does not move."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from models import logits
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import kl_div
from transformers import AutoModelForImageTextToText
from transformers.pytorch_utils import Conv1D

import vlm
from vlm.lora import add_lora, base_hash, linear_layers, load_lora, merge_lora, save_lora
from vlm.quantization import account, groups, is_quantized, parameter_count, quantize, quantized, table
from vlm.quantized_linear import GROUP, LEVELS, SCHEMES, Int4Linear, Int8Linear, QuantizedLinear
from vlm.saving import read, save

SCHEME = pytest.mark.parametrize("scheme", list(SCHEMES))


def linear_of(in_features: int = 96, out_features: int = 64, bias: bool = True) -> nn.Linear:
    """Random, with channels of very different sizes."""
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features, bias=bias)
    with torch.no_grad():
        linear.weight.mul_(torch.logspace(-3, 1, out_features)[:, None])
    return linear


def rows_of(count: int = 5, width: int = 96) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(3)) * torch.logspace(-2, 2, count)[:, None]


# One layer


def test_int8_weights_are_off_by_half_a_step_of_their_channel_at_most():
    linear = linear_of()
    error = (quantized(copy.deepcopy(linear), "int8").weight - linear.weight).abs().amax(dim=1)
    step = linear.weight.abs().amax(dim=1) / 127
    assert (error <= 0.5001 * step).all() and (error > 0.3 * step).all()


def test_int4_weights_are_off_by_half_a_step_of_their_group_at_most():
    linear = linear_of()
    error = (quantized(copy.deepcopy(linear), "int4").weight - linear.weight).unflatten(1, (-1, GROUP)).abs().amax(-1)
    low, high = linear.weight.unflatten(1, (-1, GROUP)).aminmax(dim=-1)
    # Beside the rounding to a level, scale and zero are rounded to bfloat16.
    assert (error <= 0.5 * (high - low) / 15 + (high - low + low.abs()) / 2**7).all() and error.max() > 0


@pytest.mark.parametrize("shape", [(96,), (1, 96), (2, 5, 96), (0, 96)])
def test_an_int8_product_is_the_formula_in_float64(shape):
    layer = quantized(linear_of(), "int8")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 7
    peak = x.double().abs().amax(dim=-1, keepdim=True) / LEVELS
    levels = (x.double() / peak).round()
    expected = levels @ layer.weight.double().T * peak + layer.bias.double()
    got = layer(x)
    assert got.shape == (*shape[:-1], 64)
    # Where a value lies on the edge between two levels, float32 may take the other one.
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=2e-2 * float(layer.weight.abs().max()))
    assert ((got - expected).abs() < 1e-4 * expected.abs().max()).double().mean() > 0.98 if got.numel() else True


def test_an_int4_product_is_that_of_its_weights():
    layer = quantized(linear_of(), "int4")
    x = rows_of()
    expected = x.bfloat16().double() @ layer.weight.double().T + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=2e-2, atol=2e-2)


def test_no_row_touches_another():
    layer = quantized(linear_of(), "int8")
    rows = rows_of()
    assert torch.equal(layer(rows), torch.cat([layer(row[None]) for row in rows]))
    loud = rows.clone()
    loud[1:] *= 1e6
    assert torch.equal(layer(loud)[0], layer(rows)[0])


def test_a_row_of_zeros_is_the_bias_and_nonsense_stays_nonsense():
    layer = quantized(linear_of(), "int8")
    rows = torch.zeros(2, 96)
    rows[1, 4] = torch.nan
    out = layer(rows)
    assert torch.equal(out[0], layer.bias) and out[1].isnan().all()


@SCHEME
def test_without_a_kernels_layout_the_product_is_the_same(scheme, monkeypatch):
    layer = quantized(linear_of(), scheme)
    monkeypatch.setattr(SCHEMES[scheme], "_has_layout", lambda self: False)
    plain = quantized(linear_of(), scheme)
    assert layer.packed is not None and plain.packed is None
    x = rows_of().bfloat16().float()
    expected = layer(x)
    torch.testing.assert_close(plain(x), expected, rtol=1e-2, atol=5e-3 * float(expected.abs().max()))
    assert torch.equal(plain.weight, layer.weight)


@SCHEME
@pytest.mark.parametrize("widths", [(32, 16), (96, 64), (64, 112), (4096, 16)])
def test_a_kernels_layout_gives_back_what_it_was_given(scheme, widths):
    linear = linear_of(*widths)
    values, scales = SCHEMES[scheme].rounded(linear.weight)
    layer = quantized(linear, scheme)
    assert layer.packed is not None and torch.equal(layer.values, values) and torch.equal(layer.scales, scales)


def test_conv1d_is_a_linear_layer_that_lies_on_its_side():
    torch.manual_seed(0)
    sideways = Conv1D(64, 96)
    upright = nn.Linear(96, 64)
    with torch.no_grad():
        upright.weight.copy_(sideways.weight.t())
        upright.bias.copy_(sideways.bias)
    assert torch.equal(quantized(sideways, "int8")(rows_of()), quantized(upright, "int8")(rows_of()))


def test_a_width_that_int4_cannot_group_is_int8():
    assert isinstance(quantized(nn.Linear(48, 64), "int4"), Int8Linear)
    assert isinstance(quantized(nn.Linear(64, 50), "int4"), Int8Linear)
    assert isinstance(quantized(nn.Linear(64, 64), "int4"), Int4Linear)


@SCHEME
def test_gradients_flow_to_the_input_as_through_the_rounded_weight(scheme):
    layer = quantized(linear_of(), scheme)
    x, weights = rows_of().requires_grad_(), torch.randn(5, 64)
    (layer(x) * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights @ layer.weight)
    assert not [parameter for parameter in layer.parameters() if parameter.requires_grad]


@SCHEME
def test_scales_stay_as_they_are_whatever_the_model_is_cast_to(scheme):
    layer = quantized(linear_of(), scheme)
    before = layer(rows_of())
    cast = copy.deepcopy(layer).bfloat16()
    assert cast(rows_of().bfloat16()).dtype == torch.bfloat16
    assert cast.scales.dtype == layer.scales.dtype and torch.equal(cast.values, layer.values)
    back = cast.float()
    torch.testing.assert_close(back.bias, layer.bias, rtol=1e-2, atol=1e-2)
    assert torch.equal(back(rows_of()) - back.bias, before - layer.bias) or torch.equal(
        back.product(rows_of()), layer.product(rows_of())
    )


def test_a_compiled_layer_is_one_graph_and_the_same():
    model = nn.Sequential(quantized(linear_of(), "int8"), nn.Tanh(), quantized(linear_of(64, 32), "int8"))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(rows_of()), model(rows_of()))


# A whole model


def check_whole_model(model, scheme, vision, processor, batch, folder) -> None:
    before = logits(model, batch)
    quantize(model, scheme, vision=vision)
    after = logits(model, batch)
    divergence = kl_div(after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert 0 < divergence.mean() < {"int8": 1e-4, "int4": 5e-3}[scheme]
    layers = [entry for entry in account(model) if entry.scheme]
    assert len(layers) >= 25 and {entry.name.split(".")[0] for entry in layers} >= {"language_model", "adapters"}
    if model.config.reading == "causal":
        assert isinstance(model.get_output_embeddings(), QuantizedLinear)
        assert model.generate(**batch, max_new_tokens=2, do_sample=False).shape == (2, 11)
    save(model, processor, folder)
    again, _ = read(folder)
    assert torch.equal(logits(again.eval(), batch), after)
    assert parameter_count(again) == parameter_count(model)


def test_every_family_quantizes_saves_and_loads(family, make_model, make_processor, batch, tmp_path):
    model = make_model(family, gate_init=1.0)
    check_whole_model(model, "int8", False, make_processor(), batch, tmp_path / "model")


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3_moe", "bert"])
def test_int4_and_the_vision_tower_too(kind, make_model, make_processor, batch, tmp_path):
    check_whole_model(make_model(kind, gate_init=1.0), "int4", True, make_processor(), batch, tmp_path / "model")


@pytest.mark.parametrize("vision", [False, True])
def test_every_module_is_quantized_or_kept_for_a_reason(vision, make_model):
    model = make_model("qwen3_moe", latents=4)
    quantize(model, "int8", vision=vision)
    entries = account(model)
    assert len({entry.name for entry in entries}) == len(entries)
    assert all((entry.scheme is None) == bool(entry.why) for entry in entries)
    assert sum(entry.bytes for entry in entries) == sum(
        tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()
    )
    reasons = {entry.name: entry.why for entry in entries}
    assert reasons["adapters.1"] == "gates" and reasons["text_projection"] == "contrastive space"
    assert reasons["language_model.model.embed_tokens"] == "embedding"
    assert reasons["language_model.model.layers.0.mlp.experts"] == "fused experts"
    assert reasons["language_model.model.layers.0.mlp.gate"] == "router"
    assert reasons["language_model.model.norm"] == "norm"
    tower = {entry.name for entry in entries if entry.scheme and entry.name.startswith(("vision", "resampler"))}
    assert bool(tower) == vision and (not vision or "resampler.layers.0.attention.q_proj" in tower)
    assert set(groups(entries)) >= {"int8", "kept: gates", "kept: norm"} and table(entries).row_count >= 6


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "bert"])
def test_a_base_for_lora_is_the_language_model_without_its_head(kind, make_model):
    model = make_model(kind, latents=4)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    beside = {f"language_model.{name}" for name in linear_layers(model)}
    quantize(model, "int8", base=True)
    entries = account(model)
    assert {entry.name for entry in entries if entry.scheme} == beside
    assert {entry.why for entry in entries if entry.name.startswith(("adapters.1.attention", "vision"))} <= {
        "learns beside LoRA",
        "vision tower",
    }
    assert tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)


@SCHEME
def test_under_autocast_it_computes_in_what_a_linear_layer_would(scheme):
    layer, rows = quantized(linear_of(bias=False), scheme), rows_of().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(rows)
    assert out.dtype == torch.bfloat16 and torch.equal(out, layer(rows.detach().bfloat16()))
    out.float().sum().backward()
    torch.testing.assert_close(rows.grad, layer.weight.sum(0).expand(5, -1), rtol=2e-2, atol=2e-2)


def test_a_layer_that_was_missed_does_not_go_unseen(make_model):
    model = make_model()
    quantize(model, "int8")
    model.language_model.model.layers[1].mlp.up_proj = nn.Linear(32, 48, bias=False)
    with pytest.raises(AssertionError, match="layers.1.mlp.up_proj is Linear"):
        account(model)


@pytest.mark.parametrize(("scheme", "most"), [("int8", 0.27), ("int4", 0.16)])
def test_bytes_in_memory_and_on_disk(scheme, most, tmp_path):
    linear = nn.Linear(512, 512, bias=False)
    layer = quantized(linear, scheme)
    full = 512 * 512 * 4
    held = [tensor for tensor in (*layer.buffers(), *layer.parameters())]
    if isinstance(layer.packed, Tensor):
        held.append(layer.packed)
    inside = 0 if isinstance(layer.packed, Tensor) else 512 * 512  # fbgemm's copy is the only one
    assert not [tensor for tensor in held if tensor.dtype == torch.int8]
    assert inside + sum(tensor.numel() * tensor.element_size() for tensor in held) <= most * full
    torch.save(layer.state_dict(), tmp_path / "layer")
    assert (tmp_path / "layer").stat().st_size <= most * full + 4096


def test_a_tied_head_gets_a_weight_of_its_own(make_model, make_processor, batch, tmp_path):
    model = make_model("qwen2")
    embedding = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embedding
    before = embedding.clone()
    quantize(model, "int8")
    assert torch.equal(model.get_input_embeddings().weight, before)
    save(model, make_processor(), tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"language_model.lm_head.weight_int8", "language_model.model.embed_tokens.weight"} <= names
    assert not [name for name in names if name.endswith("_proj.weight") and name.startswith(("language", "adapters"))]
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(again.eval(), batch), logits(model, batch))


def test_a_saved_folder_says_what_it_is(make_model, make_processor, tmp_path):
    model = make_model()
    quantize(model, "int8", vision=True)
    save(model, make_processor(), tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "config.json").read_text())
    assert saved["quantization"] == {"scheme": "int8", "vision": True, "base": False}
    assert "saved in int8" in (tmp_path / "model" / "README.md").read_text()


@SCHEME
def test_load_quantizes_and_what_it_saves_is_bit_equal(scheme, make_model, make_processor, batch, tmp_path):
    save(make_model(gate_init=1.0), make_processor(), tmp_path / "full")
    first = vlm.load(tmp_path / "full", quantize=scheme)
    save(first.model, first.processor, tmp_path / "small")
    second = vlm.load(tmp_path / "small")
    assert is_quantized(second.model) and torch.equal(logits(second.model, batch), logits(first.model, batch))
    half = vlm.load(tmp_path / "small", dtype="bfloat16")
    layers = [module for module in half.model.modules() if isinstance(module, QuantizedLinear)]
    theirs = [module for module in second.model.modules() if isinstance(module, QuantizedLinear)]
    assert half.model.dtype == torch.bfloat16 and all(map(lambda a, b: torch.equal(a.weight, b.weight), layers, theirs))


def test_what_cannot_be_quantized_is_refused(make_model, make_processor, tmp_path):
    save(make_model(), make_processor(), tmp_path / "full")
    with pytest.raises(vlm.UsageError, match="scheme 'int3' is unknown; choose int8 or int4"):
        vlm.load(tmp_path / "full", quantize="int3")
    small = vlm.load(tmp_path / "full", quantize="int8")
    save(small.model, small.processor, tmp_path / "small")
    with pytest.raises(vlm.UsageError, match="quantized to int8 already; quantize the full-precision one"):
        vlm.load(tmp_path / "small", quantize="int4")


def test_loading_never_makes_a_full_weight(make_model, make_processor, monkeypatch, tmp_path):
    save(make_model(), make_processor(), tmp_path / "full")
    small = vlm.load(tmp_path / "full", quantize="int8")
    save(small.model, small.processor, tmp_path / "small")
    places: list[str] = []
    rounded = Int8Linear.rounded

    def watched(weight: Tensor) -> tuple[Tensor, Tensor]:
        places.append(weight.device.type)
        return rounded(weight)

    monkeypatch.setattr(Int8Linear, "rounded", staticmethod(watched))
    again = vlm.load(tmp_path / "small").model
    layers = [name for name, module in again.named_modules() if isinstance(module, QuantizedLinear)]
    assert places == ["meta"] * len(layers)  # the shape of a weight, and never its numbers
    with safe_open(tmp_path / "small" / "model.safetensors", "pt") as file:
        assert not {f"{name}.weight" for name in layers} & set(file.keys())
        assert {file.get_tensor(f"{name}.weight_int8").dtype for name in layers} == {torch.int8}
    places.clear()
    vlm.load(tmp_path / "full", quantize="int8")
    assert set(places) == {"cpu"}


# LoRA on a rounded base


@pytest.fixture
def base(make_model) -> vlm.VLMModel:
    model = make_model("gpt2", gate_init=1.0)
    quantize(model, "int8")
    return model


def test_lora_learns_on_a_base_that_does_not_move(base, batch, make_model, tmp_path):
    before = {name: value.clone() for name, value in base.state_dict().items()}
    told = base_hash(before)
    torch.manual_seed(0)
    add_lora(base, r=4)
    learning = [parameter for name, parameter in base.named_parameters() if "lora_" in name]
    assert len(learning) == 2 * 4 * 3
    optimizer = torch.optim.AdamW(learning, lr=3e-2)
    losses = []
    for _ in range(6):
        loss = base(**batch, labels=batch["input_ids"]).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    after = {name.replace(".base_layer", ""): value for name, value in base.state_dict().items() if "lora_" not in name}
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    save_lora(base, tmp_path / "adapter", told, {})
    again = make_model("gpt2", gate_init=1.0)
    quantize(again, "int8")
    load_lora(again, tmp_path / "adapter")
    assert torch.equal(logits(again.eval(), batch), logits(base.eval(), batch))
    with pytest.raises(vlm.UsageError, match="does not merge into a quantized model"):
        merge_lora(again)


def test_updates_are_put_beside_without_making_the_weights_again_and_again(base, monkeypatch):
    made: list[Int8Linear] = []
    weight = Int8Linear.weight.fget
    monkeypatch.setattr(Int8Linear, "weight", property(lambda layer: made.append(layer) or weight(layer)))
    add_lora(base, r=4)
    assert max(made.count(layer) for layer in set(made)) <= 3


def test_a_merged_model_quantizes_on_loading(make_model, make_processor, batch, tmp_path):
    model = make_model("gpt2", gate_init=1.0)
    save(model, make_processor(), tmp_path / "full")
    told = base_hash(model.state_dict())
    add_lora(model, r=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    save_lora(model, tmp_path / "adapter", told, {})
    merge_lora(model)
    quantize(model, "int8")
    loaded = vlm.load(tmp_path / "full", adapter=tmp_path / "adapter", quantize="int8")
    assert torch.equal(logits(loaded.model, batch), logits(model, batch))


def test_an_adapter_stands_beside_a_quantized_base(base, make_processor, batch, tmp_path):
    save(base, make_processor(), tmp_path / "small")
    told = base_hash(base.state_dict())
    add_lora(base, r=4)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    save_lora(base, tmp_path / "adapter", told, {})
    loaded = vlm.load(tmp_path / "small", adapter=tmp_path / "adapter")
    assert torch.equal(logits(loaded.model, batch), logits(base.eval(), batch))
    assert Path(tmp_path / "adapter" / "base.json").exists()
