"""Vision towers: any ViT of timm or open_clip as a module from pixels to a grid of tokens.

Knows the two libraries. Knows nothing of text, adapters, or what becomes of the tokens.

Shapes: n pictures, N = grid height × grid width tokens, D features.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import PatchEmbed
from torch import Tensor, nn

from vlm.configuration import VisionConfig
from vlm.errors import UsageError

# The text tower that open_clip builds beside the visual one is thrown away.
SMALLEST_TEXT = {"context_length": 2, "vocab_size": 2, "width": 64, "heads": 1, "layers": 1}


class ConvStem(PatchEmbed):
    """Patch embedding by stride-2 3×3 convolutions (Early Convolutions Help Transformers See Better, Xiao et al. 2021).

    (n, 3, H, W) -> (n, N, D). log2(patch_size) convolutions, the channels doubling up to D / 2, then a 1×1 convolution.
    """

    proj: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        steps = int(math.log2(self.patch_size[0]))
        if self.patch_size != (2**steps, 2**steps):
            raise UsageError(f"a conv stem halves the picture, so patch_size {self.patch_size} must be a power of two")
        width, channels = self.proj.out_channels, self.proj.in_channels
        layers: list[nn.Module] = []
        for step in range(steps):
            out = max(16, width >> (steps - step))
            layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=False), nn.GroupNorm(1, out), nn.GELU()]
            channels = out
        self.proj = nn.Sequential(*layers, nn.Conv2d(channels, width, 1))


class VisionTower(nn.Module):
    """A ViT without its head: pixels (n, 3, H, W), normalised, to tokens (n, N, D), prefix tokens left out.

    trunk: a timm model (`forward_features`) or an open_clip visual tower (`forward_intermediates`).
    """

    trunk: Any

    def __init__(self, trunk: nn.Module, width: int, grid: tuple[int, int], preprocess: dict[str, Any]) -> None:
        super().__init__()
        self.trunk = trunk
        self.width = width
        self.grid = grid
        self.preprocess = preprocess

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the tower takes."""
        return tuple(self.preprocess["input_size"][-2:])

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, N, D), the trunk's final features of its patch tokens."""
        if pixel_values.shape[-2:] != self.image_size:
            raise UsageError(
                f"pictures of {tuple(pixel_values.shape[-2:])} pixels came to a tower of {self.image_size}; "
                "prepare them with the model's own processor"
            )
        if hasattr(self.trunk, "forward_features"):
            tokens_nd = self.trunk.forward_features(pixel_values)
            return tokens_nd[:, self.trunk.num_prefix_tokens :]
        features = self.trunk.forward_intermediates(
            pixel_values, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC"
        )
        return features["image_intermediates"][-1]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        self.trunk.set_grad_checkpointing(enable)


def build_tower(config: VisionConfig, pretrained: bool | str = False) -> VisionTower:
    """Build the tower that `config` names.

    pretrained: False for random weights; True for timm's own weights; an open_clip tag; or the path of a timm folder
    (`config.json` + `model.safetensors`).
    """
    library, _, name = config.name.partition(":")
    build = _timm_tower if library == "timm" else _open_clip_tower
    return build(config, name, pretrained)


def _timm_tower(config: VisionConfig, name: str, pretrained: bool | str) -> VisionTower:
    options = dict(config.kwargs or {}, num_classes=0)
    if config.image_size is not None:
        options["img_size"] = config.image_size
    if config.stem == "conv":
        options["embed_layer"] = partial(ConvStem)
    try:
        if isinstance(pretrained, str):
            trunk = timm.create_model(f"local-dir:{pretrained}", pretrained=True, **options)
        else:
            trunk = timm.create_model(name, pretrained=pretrained, **options)
    except RuntimeError as error:
        if "Unknown model" not in str(error):
            raise
        raise UsageError(f"timm has no model {name!r}; `timm.list_models()` names them") from None
    if not hasattr(trunk, "patch_embed") or not hasattr(trunk, "num_prefix_tokens"):
        raise UsageError(f"timm model {name!r} is no plain ViT (it has no patch tokens); choose a vit_*, eva* or deit*")
    preprocess = resolve_model_data_config(trunk)
    grid = tuple(trunk.patch_embed.grid_size)
    patch = trunk.patch_embed.patch_size
    _check_image_size(config, patch, preprocess["input_size"][1:])
    # A tower may take more pixels than its patches cover: SigLIP's of patch 14 was trained at 384 and reads 378 of them.
    size = trunk.patch_embed.img_size or (grid[0] * patch[0], grid[1] * patch[1])
    preprocess["input_size"] = (3, *size)
    return VisionTower(trunk, trunk.num_features, grid, _squashed(preprocess))


def _open_clip_tower(config: VisionConfig, name: str, pretrained: bool | str) -> VisionTower:
    import open_clip

    if name not in open_clip.list_models():
        raise UsageError(f"open_clip has no model {name!r}; `open_clip.list_models()` names them")
    kwargs = dict(config.kwargs or {})
    if not pretrained:
        kwargs.setdefault("text_cfg", SMALLEST_TEXT)
    with torch.device("cpu"), _no_warnings():  # open_clip moves what it builds, which a meta device does not allow
        visual = open_clip.create_model(
            name,
            pretrained=pretrained or None,
            require_pretrained=bool(pretrained),
            pretrained_text=False,
            force_image_size=config.image_size,
            **kwargs,
        ).visual
    if hasattr(visual, "trunk"):
        if not hasattr(visual.trunk, "patch_embed"):
            raise UsageError(f"open_clip model {name!r} has no ViT tower; choose one whose name holds ViT")
        grid, width = tuple(visual.trunk.patch_embed.grid_size), visual.trunk.num_features
        patch = visual.trunk.patch_embed.patch_size
    elif hasattr(visual, "conv1") and hasattr(visual, "grid_size"):
        grid, width, patch = tuple(visual.grid_size), visual.conv1.out_channels, visual.patch_size
    else:
        raise UsageError(f"open_clip model {name!r} has no ViT tower; choose one whose name holds ViT")
    _check_image_size(config, patch, _pair(open_clip.get_model_config(name)["vision_cfg"]["image_size"]))
    given = visual.preprocess_cfg
    preprocess = {
        "input_size": (3, *_pair(visual.image_size)),
        "interpolation": given["interpolation"],
        "mean": tuple(given["mean"]),
        "std": tuple(given["std"]),
    }
    return VisionTower(visual, width, grid, _squashed(preprocess))


def _check_image_size(config: VisionConfig, patch: tuple[int, int], own: tuple[int, int]) -> None:
    """Whole patches make up a picture, or the tower never sees what is left over at its edges; `own`, its authors' choice,
    stands."""
    size = config.image_size
    if size is None or tuple(size) == tuple(own) or not (size[0] % patch[0] or size[1] % patch[1]):
        return
    near = [max(side, pixels // side * side) for pixels, side in zip(size, patch, strict=True)]
    raise UsageError(
        f"vision.image_size {size[0]} × {size[1]} is no multiple of the patch {patch[0]} × {patch[1]}; choose one, such as "
        f"{near[0]} × {near[1]}"
    )


@contextmanager
def _no_warnings() -> Iterator[None]:
    """open_clip warns that weights are random; here they are loaded afterwards, or meant to be."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _squashed(preprocess: dict[str, Any]) -> dict[str, Any]:
    """The tower's timm data configuration with the whole picture kept: a centre crop would hide what is asked about."""
    return dict(preprocess, crop_pct=1.0, crop_mode="squash")


def grid_positions(grid: tuple[int, int], width: int, *, device: torch.device | None = None) -> Tensor:
    """2-D sine/cosine positions (N, width), float32: half the features for the row, half for the column.

    Each half: sin(p / 10000^(2i/d)) then cos(p / 10000^(2i/d)), d = width / 2 (Attention Is All You Need, section 3.5;
    in 2-D as MAE, He et al. 2021).
    """
    if width % 4:
        raise UsageError(f"sincos positions need a width divisible by 4, got {width}; use adapter.positions='learned'")
    quarter = width // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64, device=device) / quarter)
    rows, columns = (torch.arange(length, dtype=torch.float64, device=device) for length in grid)
    row_angles = (rows[:, None] * frequencies)[:, None].expand(-1, grid[1], -1)
    column_angles = (columns[:, None] * frequencies)[None].expand(grid[0], -1, -1)
    parts = [row_angles.sin(), row_angles.cos(), column_angles.sin(), column_angles.cos()]
    return torch.cat(parts, dim=-1).flatten(0, 1).float()
