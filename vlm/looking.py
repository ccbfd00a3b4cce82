"""Where a model looked for each word of a reply: the attention of its adapters over the picture, as a map.

Knows cross-attention weights and how tokens make words. Knows nothing of how a map is drawn.

Shapes: L tokens, H heads, K key/value heads, S image tokens a picture, M pictures, N = h·w patches of a picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import regex
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlm.adapters import CrossAttention
from vlm.errors import UsageError
from vlm.generation.request import Prompt
from vlm.generation.text import ReplyText
from vlm.model import VLMModel
from vlm.processing import VLMProcessor

# Scripts that write no spaces between words: there a character is a word.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
WORD = regex.compile(rf"\s*(?P<word>[{UNSPACED}]\p{{M}}*|[^\s{UNSPACED}]+)(?:\s+$)?")


class Talker(Protocol):
    """What of `vlm.api.VLM` is needed here."""

    model: VLMModel
    processor: VLMProcessor

    def prompt(self, messages: Sequence[dict[str, Any]]) -> Prompt: ...


@dataclass(frozen=True)
class Look:
    """One word of a reply, and where the model looked when it chose it.

    text: the word, with the white space before it; the texts of a reply in a row are the reply.
    picture: which of the conversation's pictures it looked at; None where it had none to look at, or its gates are shut.
    weights: (h, w) float32 on the CPU, over the vision tower's grid, together 1; None where `picture` is.
    """

    text: str
    picture: int | None
    weights: Tensor | None


@torch.no_grad()
def looks(talker: Talker, messages: Sequence[dict[str, Any]], reply: str) -> list[Look]:
    """The words of a `reply` to a conversation, each with the mean of its tokens' maps (see `attention_maps`).

    The reply is read again in one pass over prompt and reply. A token was chosen at the position before its own, so it is
    the attention from there that tells where the model looked for it.
    Raises UsageError for an encoder family, and for more tokens than the language model takes.
    """
    model, tokenizer = talker.model, talker.processor.tokenizer
    if model.config.reading == "masked":
        family = model.config.text_config.model_type
        raise UsageError(f"language model family {family!r} reads both ways and gives no replies; use a decoder family")
    prompt = talker.prompt(messages)
    tokens = tokenizer.encode(talker.processor.plain(reply), add_special_tokens=False)
    ids = prompt.ids + tokens
    if model.max_tokens is not None and len(ids) > model.max_tokens:
        raise UsageError(
            f"prompt and reply have {len(ids)} tokens and the language model takes {model.max_tokens}; shorten one"
        )
    pictures, maps = attention_maps(model, ids, prompt.pixels)
    found = []
    for text, places in words_of(tokenizer, tokens):
        chosen_at = [len(prompt.ids) - 1 + place for place in places]
        weights = maps[chosen_at].mean(dim=0)
        looked = bool(weights.any())
        # No reply holds a picture, so all of its words see the same one.
        found.append(Look(text, pictures[chosen_at[0]] if looked else None, weights if looked else None))
    return found


def seen_part(processor: VLMProcessor, image: Image.Image) -> Image.Image:
    """What a map lies over: the picture itself where the model sees all of it, else the part that it sees."""
    prepared = processor.image_processor
    if prepared.crop_mode == "squash" and prepared.crop_pct == 1.0:
        return image
    pixels = processor.pixels([image])[0].permute(1, 2, 0).numpy() * prepared.std + prepared.mean
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


@torch.no_grad()
def attention_maps(model: VLMModel, ids: Sequence[int], pixels: Tensor | None) -> tuple[list[int], Tensor]:
    """For each of L tokens the picture that it sees (-1: none), and where on it the adapters look from there.

    ids: L tokens, one `<image>` for each picture. pixels: (M, 3, H, W), normalised, or None.
    A map is Σ |tanh α| · softmax(Q Kᵀ / √d) / Σ |tanh α| over the adapters, α the gate of their attention, each the mean of
    its heads. Where a resampler stands between, it is carried on to the patches by attention rollout (Abnar & Zuidema 2020).
    Returns the maps (L, h, w) float32 on the CPU, each together 1, or 0 where no picture is seen or all gates are shut.
    """
    grid, patches = model.vision.grid, model.vision.grid[0] * model.vision.grid[1]
    if pixels is None:
        return [-1] * len(ids), torch.zeros(len(ids), *grid)
    input_ids = torch.tensor([list(ids)], device=model.device)
    pictures = model.token_image(input_ids)[0].cpu()
    with _recorded(model) as weights_of:
        model(input_ids=input_ids, pixel_values=pixels.to(model.device), use_cache=False)
    adapters: list[Any] = list(model.adapters.values())
    gates = torch.stack([adapter.attention_gate.tanh().abs().float().cpu() for adapter in adapters]).squeeze(1)
    mixed = torch.zeros(len(ids), len(pixels) * model.tokens_per_picture)
    for gate, adapter in zip(gates / gates.sum().clamp(min=torch.finfo().tiny), adapters, strict=True):
        mixed += gate * weights_of[adapter.attention][0]
    rows = torch.arange(len(ids))
    maps = mixed.unflatten(1, (len(pixels), -1))[rows, pictures.clamp(min=0)]  # (L, S)
    if model.resampler is not None:
        maps = (maps[:, None] @ _rollout(model.resampler, weights_of, patches)[pictures.clamp(min=0)]).squeeze(1)
    return pictures.tolist(), torch.where(pictures[:, None] >= 0, maps, 0.0).unflatten(1, grid)


def attention_weights(
    attention: CrossAttention, hidden: Tensor, keys_values: Tensor, mask: Tensor | None = None
) -> Tensor:
    """softmax(Q Kᵀ / √d), the mean of the heads, of what a `CrossAttention` is called with -> (B, L, S) float32."""
    queries = attention.q_norm(attention.q_proj(hidden).unflatten(-1, (attention.heads, attention.head_dim)))
    keys = keys_values[:, 0].float().repeat_interleave(attention.heads // attention.kv_heads, dim=1)
    scores = queries.transpose(1, 2).float() @ keys.transpose(-1, -2) * attention.head_dim**-0.5  # (B, H, L, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1).mean(dim=1)


@contextmanager
def _recorded(model: VLMModel) -> Iterator[dict[CrossAttention, Tensor]]:
    """The weights (B, L, S), on the CPU, of every cross-attention that runs within; the model is left as it was."""
    weights_of: dict[CrossAttention, Tensor] = {}

    def record(attention: CrossAttention, inputs: tuple[Any, ...], output: Tensor) -> None:
        weights_of[attention] = attention_weights(attention, *inputs).cpu()

    hooks = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, CrossAttention)]
    try:
        yield weights_of
    finally:
        for hook in hooks:
            hook.remove()


def _rollout(resampler: Any, weights_of: dict[CrossAttention, Tensor], patches: int) -> Tensor:
    """How much of each patch is in each latent, (M, S, N), together 1: half of every layer is what it attends to, half the
    residual (Abnar & Zuidema 2020, section 3). Latents hold nothing of a picture at first."""
    looked_at = [weights_of[layer.attention] for layer in resampler.layers]  # each (M, S, N + S): patches, then latents
    held = torch.zeros_like(looked_at[0][..., :patches])
    for weights in looked_at:
        held = (held + weights[..., :patches] + weights[..., patches:] @ held) / 2
    return held / held.sum(dim=-1, keepdim=True)


def words_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[tuple[str, list[int]]]:
    """The words of a text of tokens, each with the places of the tokens that write it.

    A word keeps the white space before it, the last one also what follows. A token that writes parts of two words is
    in both; the tokens of one character's bytes all write it.
    """
    text = ReplyText(tokenizer)
    ends = []
    for token in tokens:
        text.add(token)
        ends.append(len(text.shown))
    text.end()
    starts = [0, *ends[:-1]]
    # A token that shows nothing begins a character which a later one completes.
    ends = [next((end for end in ends[at:] if end > start), len(text.shown)) for at, start in enumerate(starts)]
    return [
        (
            found[0],
            [at for at in range(len(tokens)) if starts[at] < found.end("word") and ends[at] > found.start("word")],
        )
        for found in WORD.finditer(text.shown)
    ]
