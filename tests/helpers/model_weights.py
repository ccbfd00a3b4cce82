"""The weights of saved models, and whether two sets of weights are the same."""

from __future__ import annotations

import torch

from vlm.saving import read


def same(one: dict, other: dict, **close) -> bool:
    assert one.keys() == other.keys()
    return all(torch.allclose(one[name], other[name], **close, equal_nan=True) for name in one)


def equal(one: dict, other: dict) -> bool:
    return same(one, other, rtol=0.0, atol=0.0)


def weights_of(folder) -> dict:
    return read(folder)[0].state_dict()
