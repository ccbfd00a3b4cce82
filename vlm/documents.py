"""Rows that hold several documents: where each begins, and who attends to whom.

Knows document ids alone: (B, L), equal for the tokens of a document, 0 for padding. Knows nothing of models.
"""

from __future__ import annotations

import torch
from torch import Tensor


def document_positions(document_ids: Tensor) -> Tensor:
    """(B, L) -> (B, L): how many tokens of the same document stand before each token of a packed row."""
    steps = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return steps - torch.where(starts, steps, 0).cummax(dim=1).values


def one_document_each(document_ids: Tensor) -> bool:
    """Whether each row of (B, L) is one document from its first token on, and at most padding behind it."""
    own = document_ids == document_ids[:, :1]
    return bool((own | (document_ids == 0)).all() and (own[:, 1:] <= own[:, :-1]).all())


def document_mask(document_ids: Tensor, causal: bool) -> Tensor:
    """(B, 1, L, L), bool: a token attends within its document, to the past only where `causal`, and always to itself.

    Where no row holds several documents and all attend to all, (B, 1, 1, L): a long text has no room for more.
    """
    real = document_ids > 0
    if not causal and one_document_each(document_ids):
        return (real | ~real.any(dim=1, keepdim=True))[:, None, None, :]
    steps = torch.arange(document_ids.shape[1], device=document_ids.device)
    allowed = (document_ids[:, :, None] == document_ids[:, None, :]) & real[:, None, :]
    if causal:
        allowed = allowed & (steps[:, None] >= steps[None, :])
    return (allowed | (steps[:, None] == steps[None, :]))[:, None]
