"""Room for keys and values: one row a request, each row with its own position.

Knows where a token's keys and values lie, and hands transformers a cache that reads and writes there. Knows nothing of
requests, of what the tokens are, or of who may look at whom.

Shapes: R rows of the room, P positions a row, B rows and L tokens of one pass, K key/value heads, d features a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class Slots:
    """Keys and values of a language model's `layers` for R rows of P positions, (R, K, P + 1, d) each; made when first written.

    The last position belongs to nobody: padding is written there. int8: kept in 8 bits, with one float32 scale for each
    position of each head, max |x| / 127.
    """

    def __init__(self, layers: int, int8: bool = False) -> None:
        self.rows, self.length = 0, 0
        self.layers = [_Int8Layer() if int8 else _Layer() for _ in range(layers)]

    @property
    def bytes(self) -> int:
        """What all of it takes."""
        return sum(tensor.numel() * tensor.element_size() for layer in self.layers for tensor in layer.tensors())

    def reserve(self, rows: int, length: int) -> None:
        """Make room for at least so many rows and positions; what lies there stays."""
        if rows <= self.rows and length <= self.length:
            return
        rows, length = max(rows, self.rows), max(length, self.length)
        for layer in self.layers:
            layer.reserve(rows, length + 1)
        self.rows, self.length = rows, length  # not before there is memory for all of it

    def pass_over(self, first: int, positions: Tensor, real: Tensor, span: int) -> Cache:
        """The cache of one forward pass over rows `first`, `first` + 1, …

        positions (B, L): where each token stands in its row; real (B, L): False for padding. The pass sees the first `span`
        positions of its rows.
        """
        places = torch.where(real, positions, self.length)
        rows = torch.arange(first, first + len(places), device=places.device)[:, None]
        return Cache(layers=[_Pass(layer, self, rows, places, first, span) for layer in self.layers])

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first `length` positions of two rows."""
        for layer in self.layers:
            for tensor in layer.tensors():
                held = tensor[one, :, :length].clone()
                tensor[one, :, :length] = tensor[other, :, :length]
                tensor[other, :, :length] = held

    def copy(self, sources: Sequence[int], targets: Sequence[int], start: int, end: int) -> None:
        """Give each of the rows `targets` the positions from `start` to `end` of its row of `sources`."""
        for layer in self.layers:
            for tensor in layer.tensors():
                part, device = tensor[:, :, start:end], tensor.device
                held = part.index_select(0, torch.tensor(sources, device=device))
                part.index_copy_(0, torch.tensor(targets, device=device), held)


class _Layer:
    """Keys and values of one layer."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All that is kept, rows first, positions third."""
        return [tensor for tensor in (self.keys, self.values) if tensor is not None]

    def reserve(self, rows: int, positions: int) -> None:
        """Grow to so many rows and positions."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = grown(self.keys, rows, positions), grown(self.values, rows, positions)

    def write(self, rows: Tensor, places: Tensor, keys: Tensor, values: Tensor, room: Slots) -> None:
        """Put keys and values (B, K, L, d) at `places` (B, L) of `rows` (B, 1)."""
        if self.keys is None or self.values is None:
            self.keys = _room_for(keys, room)
            self.values = _room_for(values, room)
        self.keys[rows, :, places] = keys.transpose(1, 2)
        self.values[rows, :, places] = values.transpose(1, 2)

    def read(self, rows: slice, span: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, span, d)."""
        assert self.keys is not None and self.values is not None, "written before it is read"
        return self.keys[rows, :, :span], self.values[rows, :, :span]


class _Int8Layer:
    """The same in a quarter of float32's bytes."""

    def __init__(self) -> None:
        self.exact = torch.float32
        self.kept: list[Tensor] = []  # keys, their scales, values, their scales

    def tensors(self) -> list[Tensor]:
        """All that is kept, rows first, positions third."""
        return self.kept

    def reserve(self, rows: int, positions: int) -> None:
        """Grow to so many rows and positions."""
        self.kept = [grown(tensor, rows, positions) for tensor in self.kept]

    def write(self, rows: Tensor, places: Tensor, keys: Tensor, values: Tensor, room: Slots) -> None:
        """Put keys and values (B, K, L, d), rounded, at `places` (B, L) of `rows` (B, 1)."""
        self.exact = keys.dtype
        fresh = [part for states in (keys, values) for part in rounded(states)]
        if not self.kept:
            self.kept = [_room_for(part, room) for part in fresh]
        for tensor, part in zip(self.kept, fresh, strict=True):
            tensor[rows, :, places] = part.transpose(1, 2)

    def read(self, rows: slice, span: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, span, d), in the precision they came in."""
        keys, key_scales, values, value_scales = (tensor[rows, :, :span] for tensor in self.kept)
        return (keys * key_scales).to(self.exact), (values * value_scales).to(self.exact)


class _Pass(CacheLayerMixin):
    """One layer as one forward pass meets it: new tokens go to their places, and the pass sees its rows."""

    is_sliding = False

    def __init__(self, layer: Any, room: Slots, rows: Tensor, places: Tensor, first: int, span: int) -> None:
        super().__init__()
        self.layer, self.room, self.rows, self.places = layer, room, rows, places
        self.seen, self.span = slice(first, first + len(places)), span
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the room is there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(B, K, L, d) twice -> all that the rows hold, (B, K, span, d) twice."""
        self.layer.write(self.rows, self.places, key_states, value_states, self.room)
        return self.layer.read(self.seen, self.span)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a mask covers, and the first of them."""
        return self.span, 0

    def get_seq_length(self) -> int:
        """0: each row stands elsewhere, and every pass says where by its position ids and its mask."""
        return 0

    def get_max_length(self) -> int:
        """Positions a row."""
        return self.room.length

    get_max_cache_shape = get_max_length  # its name before transformers 5.20


def rounded(states: Tensor) -> tuple[Tensor, Tensor]:
    """(…, d) -> int8 (…, d) and its scales (…, 1), float32: x ≈ int8 · scale, by at most half a scale."""
    scales = states.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / 127
    return (states / scales).round().to(torch.int8), scales


def grown(tensor: Tensor, rows: int, positions: int) -> Tensor:
    """(R, K, P, d) with at least so many rows and positions: the tensor itself where it has them."""
    if tensor.shape[0] >= rows and tensor.shape[2] >= positions:
        return tensor
    larger = tensor.new_zeros(rows, tensor.shape[1], positions, tensor.shape[3])
    larger[: tensor.shape[0], :, : tensor.shape[2]] = tensor
    return larger


def _room_for(states: Tensor, room: Slots) -> Tensor:
    return states.new_zeros(room.rows, states.shape[1], room.length + 1, states.shape[3])
