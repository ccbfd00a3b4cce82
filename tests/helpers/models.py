"""Models that answer otherwise when they are asked otherwise, and what they say of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def lively(model: Any) -> Any:
    """The model with larger weights: a tiny one at birth says one word again and again, whatever it is asked."""
    with torch.no_grad():
        for weight in getattr(model, "language_model", model).parameters():
            if weight.ndim >= 2:
                weight.mul_(6)
    return model


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Those of a batch, without a graph."""
    with torch.no_grad():
        return model(**batch).logits
