"""What a test needs of the machine it runs on."""

from __future__ import annotations

import pytest
from deepspeed.accelerator import get_accelerator

FP16 = pytest.mark.skipif(
    not get_accelerator().is_fp16_supported(), reason="fp16 takes a GPU, or a CPU with AVX512-FP16"
)
