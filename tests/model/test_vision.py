"""Vision towers against the libraries they come from; positions against their formula."""

from __future__ import annotations

import json
import logging
import math

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

import vlm
from vlm.configuration import VisionConfig
from vlm.errors import UsageError
from vlm.vision import build_tower, grid_positions

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
TIMM = {
    "plain": ("vit_tiny_patch16_224", {**TINY, "patch_size": 8}, 32),
    "class and distillation token": ("deit_tiny_distilled_patch16_224", TINY, 32),
    "siglip": ("vit_base_patch16_siglip_224", TINY, 32),
    "registers and rotary positions": ("vit_small_patch16_dinov3", TINY, 32),
    "rotary positions": ("eva02_tiny_patch14_224", {"embed_dim": 48, "depth": 2, "num_heads": 3}, 28),
    "relative positions": ("beit_base_patch16_224", TINY, 32),
}
SMALL_TEXT = {"layers": 1, "width": 32, "heads": 2, "vocab_size": 8, "context_length": 4}
CLIP = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 32}
CLIP_TIMM = {
    "timm_model_name": "vit_tiny_patch16_224",
    "timm_model_pretrained": False,
    "timm_pool": "map",
    "timm_proj": "none",
    "image_size": 32,
}


@pytest.mark.parametrize("name", TIMM)
@torch.no_grad()
def test_timm_features_are_timms_own(name):
    architecture, kwargs, size = TIMM[name]
    tower = build_tower(VisionConfig(f"timm:{architecture}", size, kwargs)).eval()
    trunk = timm.create_model(architecture, num_classes=0, img_size=size, **kwargs).eval()
    trunk.load_state_dict(tower.trunk.state_dict())
    pixels = torch.randn(2, 3, size, size)
    expected = trunk.forward_features(pixels)[:, trunk.num_prefix_tokens :]
    assert torch.equal(tower(pixels), expected)
    assert expected.shape == (2, tower.grid[0] * tower.grid[1], tower.width)


@pytest.mark.parametrize(("name", "visual"), [("ViT-B-16", CLIP), ("ViT-B-16-SigLIP", CLIP_TIMM)])
@torch.no_grad()
def test_open_clip_features_are_open_clips_own(name, visual, caplog):
    kwargs = {"vision_cfg": visual, "text_cfg": SMALL_TEXT, "embed_dim": 16}
    tower = build_tower(VisionConfig(f"open_clip:{name}", 32, kwargs)).eval()
    assert not caplog.records and logging.root.manager.disable == 0
    theirs = open_clip.create_model(name, force_image_size=32, **kwargs).visual.eval()
    theirs.load_state_dict(tower.trunk.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    if visual is CLIP:
        theirs.output_tokens = True
        expected = theirs(pixels)[1]
    else:
        expected = theirs.trunk.forward_features(pixels)[:, theirs.trunk.num_prefix_tokens :]
    torch.testing.assert_close(tower(pixels), expected, atol=1e-6, rtol=1e-6)
    assert tower.grid == (2, 2) and tower.width == expected.shape[-1]


@pytest.mark.parametrize("name", ["rotary positions", "registers and rotary positions", "relative positions"])
@torch.no_grad()
def test_positions_that_are_not_saved_come_back(name, make_model, tmp_path):
    """Loading builds on the meta device, where buffers that no file holds lose their values."""
    architecture, kwargs, size = TIMM[name]
    model = make_model(vision={"name": f"timm:{architecture}", "image_size": size, "kwargs": kwargs})
    model.save_pretrained(tmp_path)
    again = vlm.VLMModel.from_pretrained(tmp_path).eval()
    pixels = torch.randn(2, 3, size, size)
    assert torch.equal(again.image_states(pixels), model.image_states(pixels))


@torch.no_grad()
def test_an_open_clip_tower_reloads(make_model, tmp_path):
    kwargs = {"vision_cfg": CLIP, "text_cfg": SMALL_TEXT, "embed_dim": 16}
    model = make_model(vision={"name": "open_clip:ViT-B-16", "kwargs": kwargs})
    model.save_pretrained(tmp_path)
    again = vlm.VLMModel.from_pretrained(tmp_path).eval()
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.image_states(pixels), model.image_states(pixels))


@torch.no_grad()
@pytest.mark.parametrize("asked", [None, 384])
def test_a_tower_takes_the_pixels_that_it_was_trained_with(asked):
    """SigLIP's of patch 14 at 384, whose last six rows and columns of pixels belong to no patch."""
    small = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    given = {"name": "timm:vit_so400m_patch14_siglip_384", "image_size": asked, "kwargs": small}
    tower = build_tower(VisionConfig.from_dict(given)).eval()
    assert tower.preprocess["input_size"] == (3, 384, 384) and tower.grid == (27, 27)
    pixels = torch.randn(1, 3, 384, 384)
    assert torch.equal(tower(pixels), tower.trunk.forward_features(pixels))


@torch.no_grad()
def test_a_timm_folder_gives_its_weights(tmp_path):
    architecture, kwargs, size = TIMM["plain"]
    trunk = timm.create_model(architecture, num_classes=0, img_size=size, **kwargs).eval()
    save_file(trunk.state_dict(), tmp_path / "model.safetensors")
    saved = {
        "architecture": architecture,
        "num_classes": 0,
        "pretrained_cfg": {},
        "model_args": {"img_size": size, **kwargs},
    }
    (tmp_path / "config.json").write_text(json.dumps(saved))
    tower = build_tower(VisionConfig(f"timm:{architecture}", size, kwargs), pretrained=str(tmp_path)).eval()
    pixels = torch.randn(2, 3, size, size)
    assert torch.equal(tower(pixels), trunk.forward_features(pixels)[:, trunk.num_prefix_tokens :])


@pytest.mark.parametrize(("grid", "width"), [((4, 4), 32), ((3, 5), 48)])
def test_sincos_positions_are_the_formula(grid, width):
    expected = torch.empty(grid[0] * grid[1], width, dtype=torch.float64)
    half = width // 2
    for row in range(grid[0]):
        for column in range(grid[1]):
            for feature in range(width):
                place = row if feature < half else column
                index = feature % half % (half // 2)
                angle = place / 10000 ** (2 * index / half)
                wave = math.sin if feature % half < half // 2 else math.cos
                expected[row * grid[1] + column, feature] = wave(angle)
    positions = grid_positions(grid, width)
    assert positions.dtype == torch.float32
    torch.testing.assert_close(positions.double(), expected, atol=1e-7, rtol=0)


@torch.no_grad()
def test_image_states_are_features_and_positions(make_model):
    pixels = torch.randn(2, 3, 32, 32)
    fixed, learned = make_model(positions="sincos"), make_model(positions="learned")
    assert torch.equal(fixed.image_states(pixels), fixed.vision(pixels) + grid_positions((4, 4), 32))
    assert learned.image_positions.shape == (16, 32) and learned.image_positions.requires_grad
    assert torch.equal(learned.image_states(pixels), learned.vision(pixels) + learned.image_positions)
    assert make_model(latents=6).image_states(pixels).shape == (2, 6, 32)


@torch.no_grad()
def test_a_conv_stem_makes_the_same_grid():
    architecture, kwargs, _ = TIMM["plain"]
    tower = build_tower(VisionConfig(f"timm:{architecture}", (32, 48), kwargs, stem="conv")).eval()
    assert tower.grid == (4, 6) and tower.image_size == (32, 48)
    assert tower(torch.randn(2, 3, 32, 48)).shape == (2, 24, 32)
    convolutions = [layer for layer in tower.trunk.patch_embed.proj if isinstance(layer, torch.nn.Conv2d)]
    assert [layer.stride[0] for layer in convolutions] == [2, 2, 2, 1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "timm:no_such_model"}, "no_such_model"),
        ({"name": "timm:resnet18"}, "resnet18"),
        ({"name": "open_clip:no-such-model"}, "no-such-model"),
        ({"name": "vit_tiny_patch16_224"}, "timm:NAME"),
        ({"name": "timm:vit_tiny_patch16_224", "stem": "wavelet"}, "wavelet"),
        ({"name": "timm:vit_tiny_patch16_224", "size": 3}, "'size'"),
        ({"name": "timm:vit_tiny_patch16_224", "stem": "conv", "kwargs": {"patch_size": 14}}, "14"),
        ({"name": "timm:vit_tiny_patch16_224", "image_size": (32, 36)}, "image_size 32 × 36 .* 16 × 16; .* 32 × 32"),
        ({"name": "timm:vit_tiny_patch16_224", "image_size": 4}, "image_size 4 × 4 .* 16 × 16; .* 16 × 16"),
        ({"name": "open_clip:ViT-S-32-alt", "image_size": 80}, "image_size 80 × 80 .* 32 × 32; .* 64 × 64"),
    ],
)
def test_towers_that_cannot_be_are_refused_in_one_line(config, message):
    with pytest.raises(UsageError, match=message) as refusal:
        build_tower(VisionConfig.from_dict(config))
    assert "\n" not in str(refusal.value)
