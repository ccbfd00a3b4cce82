"""Model FLOPs against PyTorch's own counter of what really ran, on rows without padding."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlm.configuration import VisionConfig
from vlm.processing import slots_of
from vlm.train.config_stage import Stage
from vlm.train.flops import ModelFlops, depth, known_peak, peak_flops
from vlm.train.objectives import OBJECTIVES, Plan
from vlm.train.optimization import choose_trainable
from vlm.vision import build_tower

ROWS, LENGTH = 4, 48


def batch_of(objective: str) -> dict:
    """Four full rows of tokens with a picture each, every token a target."""
    ids = torch.randint(10, 200, (ROWS, LENGTH))
    ones = torch.ones_like(ids)
    pictures = {"pixel_values": torch.rand(ROWS, 3, 32, 32)}
    if objective == "contrastive":
        return {"input_ids": ids, "attention_mask": ones} | pictures
    labels = ids.clone()
    if objective == "clm":
        return {"input_ids": ids, "attention_mask": ones, "labels": labels}
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.arange(LENGTH).expand(ROWS, -1),
        "document_ids": ones,
        "token_image": torch.zeros_like(ids),
        "image_slots": slots_of([1] * ROWS),
    } | pictures


def pairs() -> dict:
    """What a batch holds besides, for a contrastive term."""
    ids = torch.randint(10, 200, (ROWS, 16))
    return {"pair_images": torch.arange(ROWS), "pair_input_ids": ids, "pair_attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize(
    ("language", "objective", "adapter", "settings"),
    [
        ("qwen3", "joint", {}, {}),
        ("gpt2", "joint", {}, {}),
        ("gemma3_text", "joint", {}, {}),
        ("phi3", "joint", {}, {}),
        ("qwen3", "joint", {"latents": 4}, {}),
        ("qwen3", "joint", {"experts": 4, "experts_per_token": 2}, {}),
        ("qwen3", "joint", {"every": 2, "kv_heads": 2}, {"train": ["adapters"]}),
        ("qwen3", "joint", {}, {"freeze": ["vision"], "contrastive_weight": 0.5}),
        ("qwen3", "joint", {}, {"contrastive_weight": 0.5, "matching_weight": 0.5}),
        ("qwen3", "contrastive", {}, {}),
        ("bert", "contrastive", {}, {"freeze": ["language_model"]}),
        ("qwen3", "clm", {}, {}),
    ],
)
def test_they_are_what_the_counter_counts(make_model, language, objective, adapter, settings):
    model = make_model(language, gate_init=0.5, **adapter)
    if "matching_weight" in settings:
        model.add_matching_head()
    model.set_attn_implementation("eager")  # the fused kernel's backward pass counts what it computes again
    stage = Stage.model_validate({"objective": objective, "steps": 1} | settings)
    judged = OBJECTIVES[objective](model, stage)
    choose_trainable(judged, stage)
    batch = batch_of(objective) | (pairs() if stage.contrastive_weight else {})
    with FlopCounterMode(display=False) as counter:
        judged(batch, Plan(1.0))[0].backward()
    # The counter leaves out the gradient of what comes in first, pixels; the formula has no word for it.
    assert ModelFlops(judged)(batch) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("tower", "layers"),
    [
        ({"name": "timm:vit_tiny_patch16_224", "stem": "conv"}, 12),
        ({"name": "timm:vit_base_patch16_siglip_224"}, 12),
        ({"name": "timm:eva02_tiny_patch14_224"}, 12),
        ({"name": "open_clip:ViT-B-32"}, 12),
    ],
)
def test_layers_of_a_tower(tower, layers):
    with torch.device("meta"):
        assert depth(build_tower(VisionConfig(**tower))) == layers


def test_padding_and_pictures_that_nobody_sees_are_no_model_flops(make_model):
    stage = Stage.model_validate({"objective": "joint", "steps": 1})
    objective = OBJECTIVES["joint"](make_model(), stage)
    batch = batch_of("joint")
    flops = ModelFlops(objective)
    padded = dict(batch)
    for name, value in (
        ("input_ids", 0),
        ("labels", -100),
        ("position_ids", 0),
        ("document_ids", 0),
        ("token_image", -1),
    ):
        padded[name] = torch.nn.functional.pad(batch[name], (0, 16), value=value)
    padded["pixel_values"] = torch.cat([batch["pixel_values"], torch.zeros(3, 3, 32, 32)])
    assert flops(padded) == flops(batch)
    apart = batch | {"document_ids": torch.arange(LENGTH).div(24, rounding_mode="floor").add(1).expand(ROWS, -1)}
    assert flops(apart) < flops(batch), "documents do not attend to each other"


def test_an_expert_counts_for_its_share_of_the_tokens(make_model):
    stage = Stage.model_validate({"objective": "clm", "steps": 1})
    model = make_model("qwen3_moe")
    assert (model.language_model.config.num_experts, model.language_model.config.num_experts_per_tok) == (4, 2)
    flops = ModelFlops(OBJECTIVES["clm"](model, stage))
    experts = [p for name, p in model.language_model.named_parameters() if ".experts." in name]
    everything = sum(p.numel() for name, p in model.language_model.named_parameters() if p.ndim >= 2)
    outside = everything - model.get_input_embeddings().weight.numel() - sum(p.numel() for p in experts)
    head = model.get_output_embeddings().weight.numel()
    assert flops.body.weights == outside - head + sum(p.numel() for p in experts) / 2


def test_peaks():
    assert known_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert known_peak("NVIDIA H100 PCIe") == 756e12
    assert known_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert known_peak("a card of tomorrow") is None
    assert 1e8 < peak_flops(torch.device("cpu"), "fp32") < 1e14
