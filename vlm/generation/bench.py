"""`vlm bench decode`: tokens a second of the engine beside peers of the same shape, on random weights.

Knows the shapes of the benchmark and how each peer is asked for tokens. Knows nothing of how any of them decodes. A speed is
that of the tokens after the first: what the prompt and the pictures take is in neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from transformers import IdeficsConfig, IdeficsForVisionText2Text, LlamaConfig

from vlm.benchmark import Row, interleaved
from vlm.configuration import VLMConfig
from vlm.errors import UsageError
from vlm.model import VLMModel

from .decoding import Decoding
from .engine import Engine
from .request import Prompt

WIDTH, DEPTH, HEADS, INNER, WORDS = 768, 12, 12, 2048, 32_000
IMAGE, PROMPT, NEW = 3, 16, 32  # the token of a picture; tokens of a prompt, and of a reply
BATCHES = {1: "≥ 1.4", 8: "≥ 2.5"}  # rows at once -> the ratio to Idefics that is asked for
BANDWIDTH_BYTES = 2**29  # beyond any cache
SHAPE = f"{DEPTH} × {WIDTH}, every 2nd layer crossed, ViT-S/16 at 224, {WORDS:,} words, fp32"


class Mute:
    """Stands in for a tokenizer where nobody reads what is said."""

    def decode(self, tokens: list[int], **_: object) -> str:
        """One letter a token."""
        return "a" * len(tokens)


def bench_decode(against: str | None, rounds: int) -> list[Row]:
    """Rows against one peer, or against each that is always there. Raises UsageError for a name that is none."""
    benches = {"hf-idefics": beside_idefics, "hf-generate": beside_generate, "bandwidth": beside_bandwidth}
    if against is not None and against not in benches:
        raise UsageError(f"vlm bench decode knows no {against!r}; choose {', '.join(benches)}")
    torch.manual_seed(0)
    model = composite()
    return [row for name, bench in benches.items() if against in (None, name) for row in bench(model, rounds)]


def beside_idefics(model: VLMModel, rounds: int) -> list[Row]:
    """The engine beside Hugging Face's Idefics (Flamingo's idea too), which projects the image again for every token."""
    peer = idefics()
    return [
        _row(f"decode, {rows} at once, beside Idefics", model, partial(idefics_seconds, peer), rows, rounds, target)
        for rows, target in BATCHES.items()
    ]


def beside_generate(model: VLMModel, rounds: int) -> list[Row]:
    """The engine beside `model.generate`, all requests of one length: its best case."""
    return [
        _row(f"decode, {rows} at once, beside generate", model, partial(generate_seconds, model), rows, rounds)
        for rows in BATCHES
    ]


def beside_bandwidth(model: VLMModel, rounds: int) -> list[Row]:
    """One row's tokens a second, beside what memory lets through if every weight of a step is read once."""
    read = weights_read(model)
    ours, peer = interleaved(
        lambda: tokens_per_second(partial(engine_seconds, model), 1), lambda: bandwidth() / read, rounds
    )
    conditions = (
        f"{SHAPE}; {read / 2**20:,.0f} MiB of weights a token; the bound is a sum over {BANDWIDTH_BYTES >> 20} MiB"
    )
    return [Row("decode, 1 at once, beside memory bandwidth", ours, peer, "tokens/s", conditions)]


def _row(
    name: str, model: VLMModel, peer: Callable[[int, int], float], rows: int, rounds: int, target: str = ""
) -> Row:
    ours, theirs = interleaved(
        lambda: tokens_per_second(partial(engine_seconds, model), rows), lambda: tokens_per_second(peer, rows), rounds
    )
    conditions = f"{SHAPE}; {PROMPT} + {NEW} tokens a row, {torch.get_num_threads()} threads"
    return Row(name, ours, theirs, "tokens/s", conditions, target)


def tokens_per_second(seconds: Callable[[int, int], float], rows: int) -> float:
    """From the seconds that so many rows take for 1 new token and for all of them."""
    first, whole = seconds(rows, 1), seconds(rows, NEW)
    return rows * (NEW - 1) / (whole - first)


def engine_seconds(model: VLMModel, rows: int, new_tokens: int) -> float:
    """Requests with a picture each, all there from the start."""
    engine = Engine(model, Mute(), [], rows=rows, length=PROMPT + NEW)
    ids, pixels = inputs(rows)
    for words, picture in zip(ids.tolist(), pixels, strict=True):
        engine.add(Prompt(words, picture[None]), Decoding(max_new_tokens=new_tokens))
    start = time.perf_counter()
    while engine.busy:
        engine.step()
    return time.perf_counter() - start


def generate_seconds(model: VLMModel, rows: int, new_tokens: int) -> float:
    """The same by Hugging Face's loop."""
    ids, pixels = inputs(rows)
    start = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, **_greedy(new_tokens))
    return time.perf_counter() - start


@torch.no_grad()
def idefics_seconds(model: IdeficsForVisionText2Text, rows: int, new_tokens: int) -> float:
    """The same by Idefics, whose pictures stand in no token of their own."""
    ids, pixels = inputs(rows)
    start = time.perf_counter()
    model.generate(
        input_ids=ids.clamp(min=IMAGE + 1),
        attention_mask=torch.ones_like(ids),
        pixel_values=pixels[:, None],
        image_attention_mask=torch.ones(rows, PROMPT, 1),
        **_greedy(new_tokens),
    )
    return time.perf_counter() - start


def _greedy(new_tokens: int) -> dict:
    return {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }


def inputs(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts (rows, PROMPT) with a picture each, and pixels (rows, 3, 224, 224)."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(IMAGE + 1, WORDS, (rows, PROMPT), generator=generator)
    ids[:, 1] = IMAGE
    return ids, torch.randn(rows, 3, 224, 224, generator=generator)


def composite() -> VLMModel:
    """Ours in the benchmark's shape."""
    text = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        max_position_embeddings=1024,
    )
    vision = {"name": "timm:vit_small_patch16_224"}
    adapter = {"every": 2, "gate_init": 1.0}
    return VLMModel(VLMConfig(vision=vision, text_config=text, adapter=adapter, image_token_id=IMAGE)).eval()


def idefics() -> IdeficsForVisionText2Text:
    """Idefics in the same shape."""
    vision = {"embed_dim": 384, "image_size": 224, "patch_size": 16, "intermediate_size": 1536}
    return IdeficsForVisionText2Text(
        IdeficsConfig(
            vocab_size=WORDS,
            additional_vocab_size=0,
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_hidden_layers=DEPTH,
            num_attention_heads=HEADS,
            cross_layer_interval=2,
            use_resampler=False,
            alpha_initializer="ones",
            vision_config=vision | {"num_hidden_layers": 12, "num_attention_heads": 6},
        )
    ).eval()


def weights_read(model: VLMModel) -> int:
    """Bytes of weights that one token passes: the language model without its embedding table, and the adapters without what
    makes keys and values of pictures."""
    skipped = {id(model.get_input_embeddings().weight)} if model.get_output_embeddings() is not None else set()
    passed = [*model.language_model.parameters()]
    passed += [
        weight for name, weight in model.adapters.named_parameters() if "k_proj" not in name and "v_proj" not in name
    ]
    return sum(weight.numel() * weight.element_size() for weight in passed if id(weight) not in skipped)


def bandwidth() -> float:
    """Bytes a second that memory lets this process read, by a sum over what no cache holds."""
    data = torch.ones(BANDWIDTH_BYTES // 4)
    start = time.perf_counter()
    data.sum()
    return BANDWIDTH_BYTES / (time.perf_counter() - start)
