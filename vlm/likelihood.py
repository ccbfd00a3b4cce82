"""How likely a model holds what is given to it: replies in conversations, and plain texts of any length.

Knows which tokens count and which windows a long text is read in. Knows nothing of what the figures are compared with.

Shapes: B rows, L tokens, V words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import BatchFeature

from vlm.errors import UsageError
from vlm.inputs import check_length, parts, picture_key
from vlm.model import VLMModel
from vlm.processing import VLMProcessor, pictures_of, slots_of


@torch.no_grad()
def reply_likelihoods(
    model: VLMModel, processor: VLMProcessor, conversations: Sequence[Sequence[dict[str, Any]]], batch_size: int
) -> list[tuple[float, int]]:
    """For each conversation the sum of log p (natural) of what the assistant says, turn ends included, and its tokens."""
    _check_causal(model)
    results: list[tuple[float, int]] = []
    for part in parts(list(conversations), batch_size):
        encoded = [processor.encode_dialogue(conversation) for conversation in part]
        for ids, _ in encoded:
            if not ids:
                raise UsageError(
                    "a conversation has no assistant turn, so nothing to weigh; add the reply to be judged"
                )
            check_length(model, len(ids))
        results += _weigh(model, processor, encoded, [pictures_of(conversation) for conversation in part])
    return results


@torch.no_grad()
def text_likelihoods(
    model: VLMModel, processor: VLMProcessor, texts: Sequence[str], window: int, batch_size: int
) -> list[tuple[float, int]]:
    """For each text the sum of log p (natural) of all its tokens, and how many they are, `window` of them at a time."""
    _check_causal(model)
    if window < 1:
        raise UsageError(f"window is {window}; it must be at least 1")
    size = min(window, (model.max_tokens or window + 1) - 1)
    tokenizer = processor.tokenizer
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    pieces: list[tuple[int, tuple[list[int], list[bool]]]] = []
    for place, text in enumerate(texts):
        ids = tokenizer.encode(processor.plain(text), add_special_tokens=False)
        pieces += [(place, piece) for piece in _windows([start, *ids], size)]
    totals = [(0.0, 0)] * len(texts)
    for part in parts(pieces, batch_size):
        weighed = _weigh(model, processor, [piece for _, piece in part], [[] for _ in part])
        for (place, _), (told, count) in zip(part, weighed, strict=True):
            totals[place] = totals[place][0] + told, totals[place][1] + count
    return totals


def _check_causal(model: VLMModel) -> None:
    if model.config.reading == "masked":
        family = model.config.text_config.model_type
        raise UsageError(
            f"language model family {family!r} reads both ways and has no loglikelihood; use a decoder family"
        )


def _windows(ids: list[int], size: int) -> Iterator[tuple[list[int], list[bool]]]:
    """Every token but the first predicted once, `size` at a time: the ids of each piece, and which are predicted."""
    for done in range(1, len(ids), size):
        end = min(done + size, len(ids))
        start = max(0, end - size - 1)
        yield ids[start:end], [place >= done for place in range(start, end)]


def _weigh(
    model: VLMModel, processor: VLMProcessor, encoded: list[tuple[list[int], list[bool]]], rows: list[list[Any]]
) -> list[tuple[float, int]]:
    """encoded: of each row the ids, and which of them count; rows: the pictures of each."""
    length = max(len(ids) for ids, _ in encoded)
    input_ids = torch.full((len(encoded), length), processor.tokenizer.pad_token_id)
    targets = torch.zeros_like(input_ids, dtype=torch.bool)
    attention_mask = torch.zeros_like(input_ids)
    for row, (ids, is_target) in enumerate(encoded):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        targets[row, : len(ids)] = torch.tensor(is_target)
        attention_mask[row, : len(ids)] = 1
    inputs = BatchFeature({"input_ids": input_ids, "attention_mask": attention_mask, **_pictures(processor, rows)})
    inputs = inputs.to(model.device)
    logits = model(**inputs).logits[:, :-1].float()  # (B, L - 1, V)
    wanted = inputs["input_ids"][:, 1:]
    told = -F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted)
    told = told.cpu().double().masked_fill(~targets[:, 1:], 0.0)
    return list(zip(told.sum(dim=1).tolist(), targets[:, 1:].sum(dim=1).tolist(), strict=True))


def _pictures(processor: VLMProcessor, rows: Sequence[Sequence[Any]]) -> dict[str, torch.Tensor]:
    """pixel_values (distinct pictures, 3, H, W) and image_slots (rows, M); nothing where no row has a picture."""
    keyed = {picture_key(image): image for images in rows for image in images}
    if not keyed:
        return {}
    order = {key: index for index, key in enumerate(keyed)}
    slots = slots_of([len(images) for images in rows])
    slots[slots >= 0] = torch.tensor([order[picture_key(image)] for images in rows for image in images])
    return {"pixel_values": processor.pixels(list(keyed.values())), "image_slots": slots}
