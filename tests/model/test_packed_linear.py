"""Packed layers: the product against float64, rows that do not touch each other, and every way back to a plain layer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import logits
from torch import Tensor, nn

import vlm
from vlm import packed_linear
from vlm.generation.decoding import Decoding
from vlm.generation.engine import Engine
from vlm.generation.request import Prompt
from vlm.lora import add_lora, base_hash, load_lora, merge_lora, save_lora
from vlm.packed_linear import LEAST_ROWS, PackedLinear, lay_out, pack, packed_layers, unpack
from vlm.quantization import parameter_count, quantize
from vlm.saving import read, save

DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch):
    """Packing of the tiny layers of these tests."""
    monkeypatch.setattr(packed_linear, "LEAST_WEIGHTS", 1)


def linear_of(in_features: int = 96, out_features: int = 70, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias=bias).eval()


def packed_of(**widths: int) -> tuple[nn.Linear, PackedLinear]:
    """A layer, and its like packed."""
    linear = linear_of(**widths)
    layer = PackedLinear(copy.deepcopy(linear))
    assert layer.packed is not None and [name for name, _ in layer.named_parameters()] == ["bias"]
    return linear, layer


def rows_of(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def packed_model(make_model, family: str = "llama", **adapter: object) -> tuple[vlm.VLMModel, vlm.VLMModel]:
    """A model, and its like packed."""
    plain = make_model(family, gate_init=1.0, **adapter)
    model = copy.deepcopy(plain)
    pack(model.language_model, model.adapters)
    return plain, model


# One layer


@DTYPE
@pytest.mark.parametrize("shape", [(96,), (1, 96), (1, 1, 96), (3, 96), (2, 5, 96), (0, 96), (40, 96)])
def test_a_product_is_the_formula_in_float64(shape, dtype):
    layer = PackedLinear(linear_of().to(dtype))
    x = rows_of(*shape).to(dtype)
    expected = x.double() @ layer.weight.double().T + layer.bias.double()
    with torch.no_grad():
        got = layer(x)
    assert got.shape == (*shape[:-1], 70) and got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)


@pytest.mark.parametrize("widths", [(3072, 96), (768, 768), (96, 70)])
def test_no_row_touches_another(widths):
    """At widths where oneDNN sums one row in another order than many. In bfloat16 AMX does so at most widths."""
    layer, x = PackedLinear(linear_of(*widths)), rows_of(300, widths[0])
    with torch.no_grad():
        together = layer(x)
        for count in (1, 2, 3, LEAST_ROWS - 1, LEAST_ROWS, 8, 32, 33, 64, 256):
            assert torch.equal(layer(x[:count]), together[:count]), count


def test_rows_that_lie_apart():
    linear, layer = packed_of()
    x = rows_of(2, 96, 9).transpose(1, 2)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), linear(x))
        torch.testing.assert_close(layer(x[:, :1]), linear(x[:, :1]))


@DTYPE
@pytest.mark.parametrize("widths", [(96, 70), (7, 5), (64, 64), (33, 130)])
def test_the_weight_comes_back_bit_for_bit(widths, dtype):
    linear = linear_of(*widths).to(dtype)
    layer = PackedLinear(copy.deepcopy(linear))
    assert layer._parameters["weight"] is None
    assert torch.equal(layer.weight, linear.weight) and layer.weight.dtype == dtype
    layer.unpack()
    assert torch.equal(layer._parameters["weight"], linear.weight) and layer.weight.requires_grad


def test_what_trains_is_a_linear_layer():
    linear, layer = packed_of()
    layer.train()
    assert layer.packed is None and [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    x = rows_of(4, 96)
    assert torch.equal(layer(x), linear(x))
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        layer.weight.mul_(2)
    layer.eval()
    assert layer.packed is not None and torch.equal(layer.weight, 2 * linear.weight)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ (2 * linear.weight).T + linear.bias)


def test_gradients_flow_to_the_input():
    linear, layer = packed_of()
    x = rows_of(4, 96)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    linear(one).square().sum().backward()
    layer(other).square().sum().backward()
    torch.testing.assert_close(other.grad, one.grad)
    assert layer.bias.grad is None


def test_moved_cast_loaded_assigned_copied_and_pickled():
    linear, layer = packed_of()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.packed is not layer.packed and torch.equal(twin.weight, linear.weight)
    cast = copy.deepcopy(layer).to(torch.bfloat16)
    assert cast.packed is not None and torch.equal(cast.weight, linear.weight.bfloat16())
    assert copy.deepcopy(layer).double().packed is None, "oneDNN has no float64"
    assert copy.deepcopy(layer).to("meta").weight.is_meta

    other = linear_of(bias=True)
    with torch.no_grad():
        other.weight.neg_()
    layer.load_state_dict(other.state_dict())
    assert layer.packed is not None and torch.equal(layer.weight, other.weight)
    assert {name: value.shape for name, value in layer.state_dict().items()} == {"weight": (70, 96), "bias": (70,)}
    layer.weight = nn.Parameter(3 * linear.weight)
    with torch.no_grad():
        torch.testing.assert_close(layer(rows_of(2, 96)), rows_of(2, 96) @ (3 * linear.weight).T + linear.bias)


def test_autocast_casts_as_ever():
    linear, layer = packed_of()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(rows_of(3, 96)), linear(rows_of(3, 96)))


@pytest.mark.parametrize("bias", [True, False])
def test_a_compiled_layer_is_one_graph_and_the_same(bias):
    layer, x = PackedLinear(linear_of(bias=bias)), rows_of(8, 96)
    with torch.no_grad():
        compiled = torch.compile(lambda x: layer(x) * 2, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), layer(x) * 2)


# A model


def test_every_family_keeps_its_logits(family, make_model, batch):
    plain, model = packed_model(make_model, family)
    torch.testing.assert_close(logits(model, batch), logits(plain, batch), atol=1e-5, rtol=1e-4)
    kept = [m for m in model.language_model.modules() if type(m) is nn.Linear]
    assert not kept and list(packed_layers(model.adapters))


def test_layers_stand_packed_once_and_small_ones_plain(make_model, monkeypatch):
    plain, model = packed_model(make_model)
    held = [layer for layer in packed_layers(model) if layer._parameters["weight"] is not None]
    assert not held, "no second copy"
    assert parameter_count(model) == parameter_count(plain)
    monkeypatch.setattr(packed_linear, "LEAST_WEIGHTS", 32 * 48)
    pack(plain.language_model)
    assert {m.weight.numel() >= 32 * 48 for m in packed_layers(plain)} == {True}
    assert {m.weight.numel() < 32 * 48 for m in plain.language_model.modules() if type(m) is nn.Linear} == {True}


def test_a_tied_head_is_packed_beside_the_embedding(make_model, make_processor, batch, tmp_path):
    plain, model = packed_model(make_model, "qwen2")
    head = model.get_output_embeddings()
    assert head.packed is not None and head.weight is model.get_input_embeddings().weight
    assert parameter_count(model) == parameter_count(plain)
    save(model, make_processor(), tmp_path / "model")
    again, _ = read(tmp_path / "model")
    assert torch.equal(logits(again, batch), logits(plain, batch))


def test_packed_saves_what_plain_saves(make_model, make_processor, batch, tmp_path):
    plain, model = packed_model(make_model)
    assert base_hash(model.state_dict()) == base_hash(plain.state_dict())
    save(model, make_processor(), tmp_path / "model")
    again, _ = read(tmp_path / "model")
    assert torch.equal(logits(again, batch), logits(plain, batch))
    unpack(model)
    assert not list(packed_layers(model)) and torch.equal(logits(model, batch), logits(plain, batch))
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]


def test_load_packs_on_a_cpu_and_int8_is_not_touched(make_model, make_processor, batch, tmp_path):
    plain = make_model("llama", gate_init=1.0)
    save(plain, make_processor(), tmp_path / "model")
    loaded = vlm.load(tmp_path / "model", device="cpu", at_once=8).model
    assert len(list(packed_layers(loaded))) > 20
    assert not any(isinstance(module, PackedLinear) for module in loaded.vision.modules())
    torch.testing.assert_close(logits(loaded, batch), logits(plain, batch), atol=1e-5, rtol=1e-4)
    quantize(loaded, "int8")
    rounded = vlm.load(tmp_path / "model", device="cpu", quantize="int8", at_once=8).model
    assert not list(packed_layers(loaded)) and not list(packed_layers(rounded))
    assert torch.equal(logits(loaded, batch), logits(rounded, batch))


def test_for_one_row_weights_lie_transposed(make_model, make_processor, batch, tmp_path):
    plain = make_model("qwen2", gate_init=1.0)
    save(plain, make_processor(), tmp_path / "model")
    loaded = vlm.load(tmp_path / "model", device="cpu").model
    linear = [layer for layer in loaded.language_model.modules() if type(layer) is nn.Linear]
    head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert head.weight is embedding.weight and head.weight.is_contiguous()
    wide = {
        layer.weight.t().is_contiguous()
        for layer in linear
        if layer is not head and layer.out_features >= layer.in_features
    }
    assert wide == {True}
    assert all(layer.weight.is_contiguous() for layer in linear if layer.out_features < layer.in_features)
    torch.testing.assert_close(logits(loaded, batch), logits(plain, batch), atol=1e-5, rtol=1e-4)
    save(loaded, make_processor(), tmp_path / "again")
    again, _ = read(tmp_path / "again")
    assert torch.equal(logits(again, batch), logits(plain, batch))
    lay_out(8, loaded.language_model, loaded.adapters)
    assert len(list(packed_layers(loaded))) > 20
    lay_out(1, loaded.language_model, loaded.adapters)
    assert not list(packed_layers(loaded)) and loaded.get_output_embeddings().weight is embedding.weight
    unpack(loaded)
    assert torch.equal(logits(loaded, batch), logits(plain, batch))


def test_lora_merges_into_a_packed_model(make_model, batch, tmp_path):
    plain, model = packed_model(make_model)
    trained = copy.deepcopy(plain)
    add_lora(trained, r=4)
    with torch.no_grad():
        for name, weight in trained.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    save_lora(trained, tmp_path / "adapter", base_hash(plain.state_dict()), {})
    for one in (plain, model):
        load_lora(one, tmp_path / "adapter")
    torch.testing.assert_close(logits(model, batch), logits(plain, batch), atol=1e-5, rtol=1e-4)
    for one in (plain, model):
        merge_lora(one)
    assert torch.equal(logits(model, batch), logits(plain, batch))


def said(engine: Engine, prompts: list[Prompt]) -> list[list[int]]:
    generations = [engine.add(prompt, Decoding(max_new_tokens=12)) for prompt in prompts]
    while engine.busy:
        engine.step()
    return [one.tokens for one in generations]


class Mute:
    def decode(self, tokens: list[int], **_: object) -> str:
        return "a" * len(tokens)


def test_the_engine_says_what_generate_says_alone_and_in_company(make_model):
    _, model = packed_model(make_model, "qwen3")
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(6, 250, (length,), generator=generator).tolist() for length in (3, 9, 5, 12, 7, 4, 8)]
    pixels = torch.randn(len(ids), 3, 32, 32, generator=generator)
    prompts = [
        Prompt([3, *words], picture[None]) if place % 3 else Prompt(words)
        for place, (words, picture) in enumerate(zip(ids, pixels, strict=True))
    ]
    together = said(Engine(model, Mute(), [], rows=8, length=64), prompts)
    for place, prompt in enumerate(prompts):
        assert said(Engine(model, Mute(), [], rows=1, length=64), [prompt])[0] == together[place]
        inputs = torch.tensor([prompt.ids])
        done = model.generate(
            inputs, pixel_values=prompt.pixels, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert done[0, len(prompt.ids) :].tolist() == together[place]


def test_what_was_read_with_other_weights_is_forgotten(make_model):
    _, model = packed_model(make_model)
    engine, prompt = Engine(model, Mute(), [], rows=1, length=64), Prompt(list(range(10, 50)))
    said(engine, [prompt])
    layer = model.language_model.model.layers[0].self_attn.v_proj
    layer.load_state_dict({"weight": -layer.weight})
    assert said(engine, [prompt]) == said(Engine(model, Mute(), [], rows=1, length=64), [prompt])
