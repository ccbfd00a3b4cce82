"""What the adapters to other people's evaluation harnesses share: opening a model, writing as asked, weighing tokens.

Knows the settings of generation that both harnesses speak of, and the surface of a loaded model. Knows neither harness:
`lmms` and `language` import them, and nothing else does.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from vlm.api import VLM, load
from vlm.errors import UsageError
from vlm.processing import slots_of

log = logging.getLogger(__name__)

LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-evaluation-harness's order
LIMIT = 256  # its default too
KNOWN = {*LIMITS, "until", "do_sample", "temperature", "top_k", "top_p", "num_beams"}

# Token ids, which of them are weighed, and the pictures for their places.
Row = tuple[list[int], list[bool], list[Any]]


def opened(path: str, device: str, dtype: str, adapter: str | None) -> VLM:
    """`vlm.load`, for the one process that an adapter runs in. Raises UsageError for more, and for encoder families."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise UsageError(
            f"WORLD_SIZE is {processes} and the harness adapters run in 1 process; start without a launcher"
        )
    loaded = load(path, device=device, dtype=dtype, adapter=adapter)
    if loaded.model.config.reading == "masked":
        family = loaded.model.config.text_config.model_type
        raise UsageError(
            f"language model family {family!r} reads both ways and has no likelihoods; use a decoder family"
        )
    return loaded


def batch_of(size: int | str) -> int:
    """The batch size that a harness hands over, as a number or as digits; UsageError for `auto` and the like."""
    if not str(size).isdigit() or int(size) < 1:
        raise UsageError(f"batch_size is {size!r}; give a whole number of at least 1")
    return int(size)


def decoding_of(wanted: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A harness's generation settings as the fields of `Decoding`, and the texts that end a reply.

    Sampling without a temperature has 1, as in Hugging Face's `generate`. What is not known is named in the log.
    """
    given = {name: value for name, value in wanted.items() if value is not None}
    if given.keys() - KNOWN:
        log.warning("generation settings that have no meaning here: %s", ", ".join(sorted(given.keys() - KNOWN)))
    limit = next((given[name] for name in LIMITS if name in given), LIMIT)
    options: dict[str, Any] = {"max_new_tokens": int(limit), "num_beams": int(given.get("num_beams", 1))}
    temperature = float(given.get("temperature", 1.0 if given.get("do_sample") else 0.0))
    if given.get("do_sample", True) and temperature > 0:
        options |= {"temperature": temperature, "top_k": given.get("top_k") or None, "top_p": given.get("top_p")}
    until = given.get("until", [])
    return options, [until] if isinstance(until, str) else list(until)


def write(asked: Sequence[tuple[Any, Mapping[str, Any]]], put: Callable[..., list[str]]) -> list[str]:
    """The replies to prompts, each with its own settings: those with equal ones are put to the model together.

    put: a list of prompts and the fields of `Decoding` -> texts. A reply ends before the first text of `until`.
    """
    groups: dict[str, list[int]] = {}
    for place, (_, wanted) in enumerate(asked):
        groups.setdefault(repr(sorted(wanted.items())), []).append(place)
    replies = [""] * len(asked)
    for places in groups.values():
        options, until = decoding_of(asked[places[0]][1])
        for place, text in zip(places, put([asked[place][0] for place in places], **options), strict=True):
            replies[place] = _ended(text, until)
    return replies


@torch.no_grad()
def weigh(loaded: VLM, rows: Sequence[Row], batch_size: int) -> list[tuple[float, bool]]:
    """For each row the sum of log p (natural) of the tokens weighed, and whether each of them is the likeliest.

    The API's `loglikelihood` tells the first and not the second, which costs nothing beside it.
    Raises UsageError for a row of more tokens than the language model has positions for.
    """
    order = sorted(range(len(rows)), key=lambda place: len(rows[place][0]))  # the shorter of a batch are padded
    results = [(0.0, True)] * len(rows)
    for start in range(0, len(rows), batch_size):
        places = order[start : start + batch_size]
        for place, result in zip(places, _weigh([rows[place] for place in places], loaded), strict=True):
            results[place] = result
    return results


def _weigh(rows: Sequence[Row], loaded: VLM) -> list[tuple[float, bool]]:
    inputs = {name: tensor.to(loaded.model.device) for name, tensor in _inputs(rows, loaded).items()}
    weighed = pad_sequence([torch.tensor(flags) for _, flags, _ in rows], batch_first=True)[:, 1:]  # (B, L - 1)
    logits = loaded.model(**inputs).logits[:, :-1].float()  # (B, L - 1, V)
    wanted = inputs["input_ids"][:, 1:]
    told = -F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted)
    sums = told.cpu().double().masked_fill(~weighed, 0.0).sum(dim=1)
    likeliest = ((logits.argmax(dim=-1) == wanted).cpu() | ~weighed).all(dim=1)
    return list(zip(sums.tolist(), likeliest.tolist(), strict=True))


def _inputs(rows: Sequence[Row], loaded: VLM) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask (B, L), padded on the right, and with pictures pixel_values and image_slots."""
    longest = max(len(ids) for ids, _, _ in rows)
    limit = loaded.model.max_tokens or longest
    if longest > limit:
        raise UsageError(f"the text has {longest} tokens and the language model takes {limit}; shorten it")
    ids = [torch.tensor(ids) for ids, _, _ in rows]
    inputs = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=loaded.processor.tokenizer.pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }
    pictures = [picture for _, _, images in rows for picture in images]
    if pictures:
        inputs["pixel_values"] = loaded.processor.pixels(pictures)
        inputs["image_slots"] = slots_of([len(images) for _, _, images in rows])
    return inputs


def _ended(text: str, until: Sequence[str]) -> str:
    for end in until:
        text = text.partition(end)[0] if end else text
    return text
