"""How a language model is told to read packed rows: where it counts positions from, and masks in the form its family takes.

Knows Hugging Face language models and document ids. Knows nothing of pictures or losses. Who attends to whom is decided in
`documents.py`.

Shapes: B rows, L tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlm.documents import document_mask, one_document_each


def first_position(language_model: PreTrainedModel) -> int:
    """RoBERTa and its kin count positions from after their padding id; the others count from 0."""
    embeddings: Any = getattr(language_model.base_model, "embeddings", None)
    if hasattr(embeddings, "create_position_ids_from_input_ids"):
        return embeddings.padding_idx + 1
    return 0


def max_tokens(language_model: PreTrainedModel) -> int | None:
    """How many tokens a language model has positions for; None where it names no limit."""
    limit = getattr(language_model.config.get_text_config(), "max_position_embeddings", None)
    return limit - first_position(language_model) if limit else None


def reading_mask(
    language_model: PreTrainedModel, document_ids: Tensor, reading: str, bidirectional: bool
) -> Tensor | dict[str, Tensor] | None:
    """The mask of documents (B, L), in the form that the attention takes; None where the family's own reading is right.

    reading: "causal" or "masked", as `VLMConfig.reading` says. bidirectional: a causal one reads both ways.
    A family with sliding windows keeps them; where only some layers have one, there is a mask for each kind of layer.
    """
    length, masked = document_ids.shape[1], reading == "masked"
    causal = not bidirectional and not masked
    if (causal or masked) and one_document_each(document_ids):
        # In causal reading what fills up a row stands behind all that could attend to it.
        return None if causal else (document_ids > 0).long()
    allowed = document_mask(document_ids, causal)
    text = language_model.config.get_text_config()
    kinds, window = getattr(text, "layer_types", None), getattr(text, "sliding_window", None)
    # A decoder's window says how far back it looks; one that reads both ways is given its whole document.
    if not window or length <= window or not (causal or masked) or (kinds and "sliding_attention" not in kinds):
        return _as_taken(allowed, language_model)
    steps = torch.arange(length, device=document_ids.device)
    back = steps[:, None] - steps[None, :]  # (L, L): how far before a token another one stands
    within = _as_taken(allowed & (back < window if causal else back.abs() <= window), language_model)
    return {"full_attention": _as_taken(allowed, language_model), "sliding_attention": within} if kinds else within


def _as_taken(allowed: Tensor, language_model: PreTrainedModel) -> Tensor:
    """(B, 1, L or 1, L), True where a token may attend, as the language model's attention takes it."""
    if language_model.config._attn_implementation == "sdpa":
        return allowed
    allowed, dtype = allowed.expand(-1, -1, allowed.shape[-1], -1), language_model.dtype
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
