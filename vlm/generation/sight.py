"""What the language model is told in one pass over rows of their own positions: masks over keys, and keys of pictures.

Knows attention windows and picture stores. Knows nothing of requests or of what is generated.

Shapes: B rows and L tokens of a pass, R rows of the room, A adapters, M pictures a row, K heads, S image tokens, d features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from vlm.errors import UsageError

from .slots import grown

WINDOWS = {"full_attention": None, "sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


def masks(config: PreTrainedConfig, positions: Tensor, span: int, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """Which of a row's first `span` positions each token (B, L) attends to: the past and itself, within the layer's window.

    Returns (B, 1, L, span), 0 or the lowest number of `dtype`, to be added; one for each type of layer where a family has
    several. Raises UsageError for layers that keep something else than keys and values.
    """
    types = sorted(set(getattr(config, "layer_types", None) or ()))
    if unknown := [kind for kind in types if kind not in WINDOWS]:
        raise UsageError(
            f"language model family {config.model_type!r} has {unknown[0]} layers, which keep no keys and values in slots; "
            "use a family with full, sliding or chunked attention"
        )
    if types in ([], ["full_attention"]):
        window = getattr(config, "sliding_window", None) if not types else None
        return _added(_sees(positions, span, window), dtype)
    return {
        kind: _added(
            _in_chunk(positions, span, getattr(config, WINDOWS[kind] or ""))
            if kind == "chunked_attention"
            else _sees(positions, span, getattr(config, WINDOWS[kind] or "", None)),
            dtype,
        )
        for kind in types
    }


def _sees(positions: Tensor, span: int, window: int | None) -> Tensor:
    keys = torch.arange(span, device=positions.device)
    seen = keys <= positions[..., None]
    return seen if window is None else seen & (keys > positions[..., None] - window)


def _in_chunk(positions: Tensor, span: int, size: int) -> Tensor:
    keys = torch.arange(span, device=positions.device)
    return _sees(positions, span, None) & (keys // size == positions[..., None] // size)


def _added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    lowest = torch.finfo(dtype).min
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, lowest)[:, None]


class Gallery:
    """Every adapter's keys and values of the pictures of each row, (R, A·2·K, M·S, d); made when first hung.

    picture_tokens: S. A picture is known by its key, so that rows which show the same one need it encoded once.
    """

    def __init__(self, picture_tokens: int) -> None:
        self.picture_tokens = picture_tokens
        self.shape: torch.Size | None = None  # (A, 2, K, S, d)
        self.store: Tensor | None = None

    @property
    def bytes(self) -> int:
        """What all of it takes."""
        return 0 if self.store is None else self.store.numel() * self.store.element_size()

    def hang(self, row: int, slot: int, keys_values: Tensor, rows: int, slots: int) -> None:
        """Put one picture's (A, 2, K, S, d) into a slot of a row, with room for so many rows and slots."""
        self.shape = keys_values.shape
        flat = keys_values.flatten(0, 2)  # (A·2·K, S, d)
        if self.store is None:
            self.store = flat.new_zeros(rows, len(flat), slots * self.picture_tokens, flat.shape[-1])
        self.store = grown(self.store, rows, slots * self.picture_tokens)
        self.store[row, :, self._place(slot)] = flat

    def reserve(self, rows: int) -> None:
        """Make room for at least so many rows; what hangs there stays."""
        if self.store is not None:
            self.store = grown(self.store, rows, self.store.shape[2])

    def take(self, row: int, slot: int) -> Tensor:
        """One picture's (A, 2, K, S, d)."""
        assert self.store is not None and self.shape is not None, "hung before it is taken"
        return self.store[row, :, self._place(slot)].unflatten(0, self.shape[:3])

    def seen_from(self, first: int, rows: int, slots: int) -> Tensor:
        """(B, A, 2, K, M·S, d) for `rows` rows from `first` on that show at most `slots` pictures each; no copy."""
        assert self.store is not None and self.shape is not None, "hung before it is seen"
        return self.store[first : first + rows, :, : slots * self.picture_tokens].unflatten(1, self.shape[:3])

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Show in each of the rows `targets` what its row of `sources` shows."""
        if self.store is not None:
            self.store[list(targets)] = self.store[list(sources)]

    def swap(self, one: int, other: int) -> None:
        """Exchange what two rows show."""
        if self.store is not None:
            self.store[[one, other]] = self.store[[other, one]]

    def _place(self, slot: int) -> slice:
        return slice(slot * self.picture_tokens, (slot + 1) * self.picture_tokens)
