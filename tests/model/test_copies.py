"""The composite as a module: copies, LoRA, checkpointed gradients, ready parts, and names that files depend on."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from peft import LoraConfig, inject_adapter_in_model

import vlm
from vlm.documents import document_positions
from vlm.vision import build_tower

OWN_NAMES = """
adapters.1.attention.k_norm.weight
adapters.1.attention.k_proj.weight
adapters.1.attention.o_proj.weight
adapters.1.attention.q_norm.weight
adapters.1.attention.q_proj.weight
adapters.1.attention.v_proj.weight
adapters.1.attention_gate
adapters.1.attention_norm.bias
adapters.1.attention_norm.weight
adapters.1.feed_forward.down_proj.weight
adapters.1.feed_forward.up_proj.weight
adapters.1.feed_forward_gate
adapters.1.feed_forward_norm.bias
adapters.1.feed_forward_norm.weight
image_pool.attention.k_proj.weight
image_pool.attention.o_proj.weight
image_pool.attention.q_proj.weight
image_pool.attention.v_proj.weight
image_pool.norm.bias
image_pool.norm.weight
image_pool.projection.weight
image_pool.query
image_positions
logit_bias
logit_scale
resampler.latents
resampler.layers.0.attention.k_proj.weight
resampler.layers.0.attention.o_proj.weight
resampler.layers.0.attention.q_proj.weight
resampler.layers.0.attention.v_proj.weight
resampler.layers.0.feed_forward.down_proj.weight
resampler.layers.0.feed_forward.up_proj.weight
resampler.layers.0.feed_forward_norm.bias
resampler.layers.0.feed_forward_norm.weight
resampler.layers.0.latent_norm.bias
resampler.layers.0.latent_norm.weight
resampler.layers.0.source_norm.bias
resampler.layers.0.source_norm.weight
resampler.norm.bias
resampler.norm.weight
text_projection.weight
""".split()


@pytest.fixture
def batch():
    """Tokens (2, 7) with a picture each, and the pictures."""
    ids = torch.randint(6, 250, (2, 7), generator=torch.Generator().manual_seed(1))
    ids[:, 1] = 3
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))}


def test_parameter_names_are_an_interface(make_model, make_text_config):
    model = make_model(layers=(1,), positions="learned", latents=4, resampler_depth=1, qk_norm=True)
    names = list(model.state_dict())
    own = [name for name in names if not name.startswith(("vision.trunk.", "language_model."))]
    assert sorted(own) == OWN_NAMES
    untouched = hf.AutoModelForCausalLM.from_config(make_text_config())
    assert [name for name in names if name.startswith("language_model.")] == [
        f"language_model.{name}" for name in untouched.state_dict()
    ]


@torch.no_grad()
def test_a_copy_uses_its_own_adapters(make_model, batch):
    model = make_model(gate_init=1.0)
    before = model(**batch).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**batch).logits, before)
    for adapter in model.adapters.values():
        adapter.attention_gate.zero_()
        adapter.feed_forward_gate.zero_()
    assert torch.equal(twin(**batch).logits, before)
    assert torch.equal(model(**batch).logits, model(input_ids=batch["input_ids"]).logits)


def test_lora_keeps_the_composite_and_trains_through_it(make_model, batch):
    model = make_model(gate_init=1.0)
    before = model(**batch).logits
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), model.language_model)
    assert isinstance(model, vlm.VLMModel)
    assert torch.equal(model(**batch).logits, before)
    twin = copy.deepcopy(model)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    moved = [name for name, parameter in model.named_parameters() if parameter.grad is not None and "lora_B" in name]
    assert len(moved) == 2 * 3
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_" in name or "gate" in name:
                parameter.add_(0.5)
    assert torch.equal(model(**batch).logits, before)
    assert not torch.allclose(twin(**batch).logits, before)


@pytest.mark.parametrize("family_name", ["qwen3", "gpt2", "bert"])
def test_checkpointed_gradients_are_the_same(family_name, make_model, batch):
    model = make_model(family_name, gate_init=1.0, latents=3)

    def gradients() -> dict[str, torch.Tensor]:
        model.train().zero_grad()
        torch.manual_seed(0)  # for dropout, which the recomputation must repeat
        model(**batch, labels=batch["input_ids"]).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable()
    model.vision.set_grad_checkpointing()
    recomputed: list[str] = []
    for key, adapter in model.adapters.items():
        assert adapter.gradient_checkpointing
        adapter.attention.register_forward_hook(lambda module, args, output, key=key: recomputed.append(key))
    checkpointed = gradients()
    assert sorted(recomputed) == sorted(2 * list(model.adapters))
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-5)
    assert any(name.startswith("vision.trunk.patch_embed") for name in plain)


def test_the_whole_forward_traces_into_one_graph(make_model, batch):
    model = make_model(gate_init=1.0)
    slots = torch.tensor([[0], [1]])
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        expected = model(**batch, image_slots=slots).logits
        torch.testing.assert_close(compiled(**batch, image_slots=slots).logits, expected)
    torch.compiler.reset()


@torch.no_grad()
def test_ready_parts_go_in_untouched(make_model, make_text_config):
    config = make_model().config
    vision, language_model = build_tower(config.vision_config), hf.AutoModelForCausalLM.from_config(make_text_config())
    weights = {
        **{f"vision.{name}": value.clone() for name, value in vision.state_dict().items()},
        **{f"language_model.{name}": value.clone() for name, value in language_model.state_dict().items()},
    }
    fresh = vlm.VLMConfig(vision=config.vision, text_config=make_text_config(), image_token_id=3)
    model = vlm.VLMModel(fresh, vision=vision, language_model=language_model)
    assert model.vision is vision and model.language_model is language_model
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())


def test_tied_embeddings_stay_tied_through_saving_and_resizing(make_model, tmp_path):
    model = make_model("qwen2")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path)
    again = vlm.VLMModel.from_pretrained(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert again.get_input_embeddings().weight.shape == (300, 32)
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_a_saved_dtype_comes_back(make_model, tmp_path, batch):
    model = make_model(gate_init=1.0).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = vlm.VLMModel.from_pretrained(tmp_path, dtype="auto").eval()
    saved = model.state_dict()
    assert all(
        value.dtype == torch.bfloat16 and torch.equal(value, saved[name]) for name, value in again.state_dict().items()
    )
    with torch.no_grad():
        assert again(**batch).logits.isfinite().all()


def test_positions_restart_with_each_document():
    documents = torch.tensor([[1, 1, 1, 2, 2, 3, 0, 0], [0, 0, 1, 1, 1, 1, 2, 2]])
    expected = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 0, 1, 2, 3, 0, 1]])
    assert torch.equal(document_positions(documents), expected)
