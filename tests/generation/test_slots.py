"""Rows of keys and values: what is written at a place is read there, by any family's layers."""

from __future__ import annotations

import pytest
import torch

from vlm.generation.slots import Slots, grown, rounded


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(rows: int = 3, length: int = 10) -> tuple[Slots, torch.Tensor]:
    """Two layers with a token at every place of every row: (rows, heads, length, features)."""
    slots, keys = Slots(layers=2), states(rows, 2, length, 4)
    slots.reserve(rows, length)
    positions = torch.arange(length).expand(rows, -1)
    cache = slots.pass_over(0, positions, torch.ones_like(positions, dtype=torch.bool), length)
    for layer in range(2):
        cache.update(keys * (layer + 1), -keys, layer)
    return slots, keys


def read(slots: Slots, layer: int = 0) -> torch.Tensor:
    """The keys of a layer, nobody's place left out."""
    return slots.layers[layer].tensors()[0][:, :, :-1]


def test_each_row_is_written_at_its_own_place_and_padding_nowhere():
    slots, keys = filled()
    new = states(2, 2, 3, 4, seed=1)
    positions = torch.tensor([[4, 5, 6], [8, 0, 0]])
    real = torch.tensor([[True, True, True], [True, False, False]])
    seen, _ = slots.pass_over(1, positions, real, span=9).update(new, new, 0)
    expected = keys.clone()
    expected[1, :, 4:7], expected[2, :, 8] = new[0], new[1, :, 0]
    assert torch.equal(seen, expected[1:, :, :9])
    assert torch.equal(read(slots), expected)
    assert torch.equal(read(slots, 1), keys * 2)


def test_rows_change_places_and_are_copied_as_far_as_asked():
    slots, keys = filled()
    slots.swap(0, 2, 6)
    expected = keys.clone()
    expected[0, :, :6], expected[2, :, :6] = keys[2, :, :6], keys[0, :, :6]
    assert torch.equal(read(slots), expected)
    slots.copy([1, 1], [0, 2], 2, 5)
    expected[0, :, 2:5] = expected[2, :, 2:5] = keys[1, :, 2:5]
    assert torch.equal(read(slots), expected)


def test_room_that_grows_keeps_what_lies_there():
    slots, keys = filled()
    before = slots.bytes
    slots.reserve(5, 21)
    assert torch.equal(read(slots)[:3, :, :10], keys) and slots.bytes == before * 5 * 22 // (3 * 11)
    tensor = states(2, 2, 5, 4)
    assert grown(tensor, 2, 4) is tensor


def test_where_memory_runs_out_what_lies_there_stays(monkeypatch):
    slots, keys = filled()
    layer = type(slots.layers[0])
    grow = layer.reserve

    def fail_second(self, rows: int, positions: int) -> None:
        if self is slots.layers[1]:
            raise torch.cuda.OutOfMemoryError("now")
        grow(self, rows, positions)

    with monkeypatch.context() as full:
        full.setattr(layer, "reserve", fail_second)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            slots.reserve(5, 21)
    assert (slots.rows, slots.length) == (3, 10)
    slots.reserve(5, 21)
    assert torch.equal(read(slots)[:3, :, :10], keys) and torch.equal(read(slots, 1)[:3, :, :10], keys * 2)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_rounding_errs_by_half_a_step_at_most(scale):
    given = states(2, 3, 5, 16) * scale
    kept, scales = rounded(given)
    assert kept.dtype == torch.int8 and scales.dtype == torch.float32 and scales.shape == (2, 3, 5, 1)
    assert ((kept * scales - given).abs() <= scales / 2 * 1.001).all()
    assert torch.equal(rounded(torch.zeros(1, 4))[0], torch.zeros(1, 4, dtype=torch.int8))
