"""Pictures of a batch as the 256 levels they were decoded to, until their micro-batch is run: a quarter of the memory.

Knows what a processor does to levels, and undoes it. Knows nothing of samples or models. Nothing is lost: pictures that are
not levels to the last bit stay as they are.

Shapes: n pictures of H × W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

LARGEST = 255.0


def shrink(batch: dict[str, Any], mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """The batch with its pixel_values (n, 3, H, W), float32 and normalised by `mean` and `std`, as levels of uint8.

    `pixel_norm` (2, 3) stands beside them. As it was where `restore` would not give back the same bits.
    """
    if "pixel_values" not in batch:
        return batch
    norm, pixels = torch.tensor([list(mean), list(std)]), batch["pixel_values"]
    middle, spread = norm[:, :, None, None]
    levels = pixels.mul(spread).add_(middle).mul_(LARGEST).round_().clamp_(0, LARGEST).to(torch.uint8)
    small = batch | {"pixel_values": levels, "pixel_norm": norm}
    return small if torch.equal(restore(small)["pixel_values"], pixels) else batch


def restore(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch as it was before `shrink`."""
    if "pixel_norm" not in batch:
        return batch
    norm = batch["pixel_norm"]
    middle, spread = norm[:, :, None, None]
    # A tensor, by which a GPU divides; by a number it would multiply with the inverse, which is rounded.
    pixels = batch["pixel_values"].float().div_(norm.new_full((1,), LARGEST)).sub_(middle).div_(spread)
    return {name: value for name, value in batch.items() if name != "pixel_norm"} | {"pixel_values": pixels}
