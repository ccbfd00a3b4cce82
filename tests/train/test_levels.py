"""Pictures held as levels: what comes back is what went in, bit for bit, or they are not held so."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlm.processing import VLMImageProcessor
from vlm.train.batches import on_device
from vlm.train.levels import restore, shrink

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
OPENAI = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


@pytest.mark.parametrize("numbers", [{}, IMAGENET, OPENAI])
def test_every_level_of_every_channel_comes_back(numbers):
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    processor = VLMImageProcessor(input_size=(3, 16, 16), **numbers)
    batch = dict(processor([np.stack([every, every.T, every[::-1]], axis=-1)]))
    small = shrink(batch, processor.mean, processor.std)
    assert small["pixel_values"].dtype == torch.uint8 and len(small["pixel_values"].unique()) == 256
    back = on_device(small, torch.device("cpu"))
    assert back.keys() == batch.keys() and torch.equal(back["pixel_values"], batch["pixel_values"])


@pytest.mark.parametrize("pixels", [torch.zeros(1, 3, 8, 8), torch.full((2, 3, 8, 8), 7.0), torch.randn(1, 3, 8, 8)])
def test_what_is_no_level_stays_as_it_is(pixels):
    batch = {"pixel_values": pixels}
    assert shrink(batch, IMAGENET["mean"], IMAGENET["std"]) is batch and restore(batch) is batch


def test_a_batch_of_texts_is_left_alone():
    batch = {"input_ids": torch.ones(1, 2)}
    assert shrink(batch, **IMAGENET) is batch and on_device(batch, torch.device("cpu")).keys() == batch.keys()
