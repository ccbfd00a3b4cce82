"""Tiny models to call, and pictures to show them."""

from __future__ import annotations

import pytest

import vlm


@pytest.fixture(scope="module")
def talker(make_model, make_processor):
    """A causal model with open gates."""
    return vlm.VLM(make_model(gate_init=1.0), make_processor())


@pytest.fixture(scope="module")
def filler(make_model, make_processor):
    """An encoder model with open gates."""
    return vlm.VLM(make_model("bert", gate_init=1.0), make_processor())


@pytest.fixture
def pictures(make_picture):
    """Three pictures."""
    return [make_picture(seed) for seed in range(3)]
