"""What the tests of layers and towers ask a model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Tokens (2, 9) with a picture each, and the pictures."""
    ids = torch.randint(6, 250, (2, 9), generator=torch.Generator().manual_seed(1))
    ids[:, 1] = 3
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))}
