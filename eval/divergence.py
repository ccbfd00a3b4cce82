"""How far one model's next-token distributions are from another's, on what samples say.

Knows two models that share a processor. Knows nothing of why they differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlm.processing import slots_of
from vlm.samples import Sample

from .pictures import as_it_is
from .tasks.base import Item, with_pictures
from .tasks.shards import Perplexity


@torch.no_grad()
def divergence(reference: Any, other: Any, samples: Sequence[Sample], batch: int) -> dict[str, float | int]:
    """Over the target tokens of each sample's first text: the mean and the greatest KL(reference ‖ other) in nats, the share
    of tokens whose likeliest word is the same, and how many tokens there are. Both are what `vlm.load` returns."""
    items = Perplexity().items(samples, reference.processor.caption_prompt)
    told = [_told(reference, other, items[start : start + batch], samples) for start in range(0, len(items), batch)]
    kl, agree = (torch.cat(column) for column in zip(*told, strict=True))
    return {"mean": kl.mean().item(), "max": kl.max().item(), "agree": agree.mean().item(), "tokens": len(kl)}


def _told(reference: Any, other: Any, items: Sequence[Item], samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Of each target token the divergence, and 1.0 where both models find the same word likeliest."""
    inputs, targets = _inputs(reference.processor, items, samples)
    p, q = (
        one.model(**{name: value.to(one.model.device) for name, value in inputs.items()}).logits[:, :-1][targets]
        for one in (reference, other)
    )
    log_p, log_q = (logits.double().cpu().log_softmax(dim=-1) for logits in (p, q))  # (targets, V)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1), (log_p.argmax(-1) == log_q.argmax(-1)).double()


def _inputs(processor: Any, items: Sequence[Item], samples: Sequence[Sample]) -> tuple[dict[str, Tensor], Tensor]:
    """What the model takes, padded on the right, and (B, L - 1) True where the next token is a target."""
    look = as_it_is(samples)
    pictures = [look.load(look.key(item.sample)) for item in items]
    encoded = [
        processor.encode_dialogue(with_pictures(item.messages, images))
        for item, images in zip(items, pictures, strict=True)
    ]
    length = max(len(ids) for ids, _ in encoded)
    input_ids = torch.full((len(items), length), processor.tokenizer.pad_token_id)
    attention_mask, targets = torch.zeros_like(input_ids), torch.zeros_like(input_ids, dtype=torch.bool)
    for row, (ids, is_target) in enumerate(encoded):
        input_ids[row, : len(ids)], targets[row, : len(ids)] = torch.tensor(ids), torch.tensor(is_target)
        attention_mask[row, : len(ids)] = 1
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if any(pictures):
        inputs["pixel_values"] = processor.pixels([image for images in pictures for image in images])
        inputs["image_slots"] = slots_of([len(images) for images in pictures])
    return inputs, targets[:, 1:]
