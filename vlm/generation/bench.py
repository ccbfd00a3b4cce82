"""`vlm bench decode`: tokens a second of the engine beside peers of the same shape, on random weights.

Knows the shapes of the benchmark and how each peer is asked for tokens. Knows nothing of how any of them decodes. A speed is
that of the tokens after the first: what the prompt and the pictures take is in neither.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import IdeficsConfig, IdeficsForVisionText2Text, LlamaConfig, Qwen3Config

from vlm.benchmark import Row, interleaved
from vlm.configuration import VLMConfig
from vlm.errors import UsageError
from vlm.model import VLMModel
from vlm.packed_linear import lay_out, unpack
from vlm.quantization import quantize
from vlm.quantized_linear import QuantizedLinear

from . import bench_llama
from .decoding import Decoding
from .engine import Engine
from .request import Prompt

WIDTH, DEPTH, HEADS, INNER, WORDS = 768, 12, 12, 2048, 32_000
IMAGE, PROMPT, NEW = 3, 16, 32  # the token of a picture; tokens of a prompt, and of a reply
BATCHES = {1: "≥ 1.4", 8: "≥ 2.5"}  # rows at once -> the ratio to Idefics that is asked for
BEAMS, SEARCHES = 4, (1, 4)  # of a request, and requests at once
HALF_BILLION = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 22,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
HUNDRED_MILLION = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
BESIDE_LLAMA = (HUNDRED_MILLION, HALF_BILLION | {"num_hidden_layers": 25})
LLAMA_TARGET = "≥ 1.2"
QUANTIZED = {"int8": {1: "≥ 3", 8: "≥ 4"}, "int4": {1: "", 8: ""}}  # scheme -> rows at once -> the ratio to float32
BOUND_TARGET = "≥ 0.65"
BANDWIDTH_BYTES = 2**29  # beyond any cache
SHAPE = f"{DEPTH} × {WIDTH}, every 2nd layer crossed, ViT-S/16 at 224, {WORDS:,} words, fp32"


class Mute:
    """Stands in for a tokenizer where nobody reads what is said."""

    def decode(self, tokens: list[int], **_: object) -> str:
        """One letter a token."""
        return "a" * len(tokens)


def bench_decode(against: str | None, rounds: int) -> list[Row]:
    """Rows against one peer, or against each that is always there. Raises UsageError for a name that is none."""
    benches = {
        "hf-idefics": beside_idefics,
        "hf-generate": beside_generate,
        "hf-beams": beside_beams,
        "fp32": beside_float32,
        "bandwidth": beside_bandwidth,
    }
    named = {**benches, "llama.cpp": beside_llama}
    if against is not None and against not in named:
        raise UsageError(f"vlm bench decode knows no {against!r}; choose {', '.join(named)}")
    torch.manual_seed(0)
    chosen = benches.values() if against is None else [named[against]]
    return [row for bench in chosen for row in bench(rounds)]


def beside_idefics(rounds: int) -> list[Row]:
    """The engine beside Hugging Face's Idefics (Flamingo's idea too), which projects the image again for every token."""
    model, peer = composite(), partial(idefics_seconds, idefics())
    return [
        _row(
            f"decode, {rows} at once, beside Idefics",
            partial(engine_seconds, ready(model, rows)),
            peer,
            rows,
            rounds,
            target,
        )
        for rows, target in BATCHES.items()
    ]


def beside_generate(rounds: int) -> list[Row]:
    """The engine beside `model.generate`, all requests of one length: its best case."""
    model = composite()
    ours, theirs = partial(engine_seconds, model), partial(generate_seconds, model)
    return [_row(f"decode, {rows} at once, beside generate", ours, theirs, rows, rounds) for rows in BATCHES]


def beside_beams(rounds: int) -> list[Row]:
    """The engine beside `model.generate`, both searching with as many beams."""
    model = composite()
    ours, theirs = partial(engine_seconds, model, beams=BEAMS), partial(generate_seconds, model, beams=BEAMS)
    return [
        _row(f"decode, {rows} at once with {BEAMS} beams, beside generate", ours, theirs, rows, rounds)
        for rows in SEARCHES
    ]


def beside_float32(rounds: int) -> list[Row]:
    """A language model of half a billion in int8 and int4 beside itself in float32, text alone, all by the engine: in PyTorch's
    own layers, which the targets speak of, and laid out as `vlm.load` does it."""
    model, rows = half_billion(), []
    full, shape = partial(engine_seconds, model), _shape(model)
    for scheme, targets in QUANTIZED.items():
        smaller = copy.deepcopy(model)
        quantize(smaller, scheme)
        ours = partial(engine_seconds, smaller)
        for at_once, target in targets.items():
            name = f"{scheme} decode, {at_once} at once, beside float32"
            unpack(model)
            rows.append(_row(f"{name} in plain layers", ours, full, at_once, rounds, target, shape))
            ready(model, at_once)
            rows.append(_row(f"{name} laid out", ours, full, at_once, rounds, "", shape))
    return rows


def beside_bandwidth(rounds: int) -> list[Row]:
    """Half a billion in int8, one row, beside what memory lets through if every weight of a step is read once."""
    model = half_billion()
    shape = _shape(model)
    quantize(model, "int8")
    read = weights_read(model)
    engine = Engine(model, Mute(), [], rows=1, length=PROMPT + NEW, compile=True)
    seconds_of(engine, 1, NEW)  # compiles
    ours, peer = interleaved(
        lambda: tokens_per_second(partial(seconds_of, engine), 1), lambda: bandwidth() / read, rounds
    )
    conditions = (
        f"{shape}, compiled; {read / 2**20:,.0f} MiB of weights a token; the bound is a sum over "
        f"{BANDWIDTH_BYTES >> 20} MiB, {torch.get_num_threads()} threads"
    )
    return [Row("int8 decode, 1 at once, beside memory bandwidth", ours, peer, "tokens/s", conditions, BOUND_TARGET)]


def beside_llama(rounds: int) -> list[Row]:
    """The same weights in our int8 and in llama.cpp's Q8_0, one row, each as it is fastest: ours compiled."""
    bench_llama.check_installed()
    return [_beside_llama(qwen3(shape), rounds) for shape in BESIDE_LLAMA]


def _beside_llama(model: VLMModel, rounds: int) -> Row:
    (ids,), _ = inputs(1)
    shape, threads = _shape(model), torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="vlm-bench-") as place:
        file = Path(place, "model.gguf")
        bench_llama.write_gguf(model.language_model, file, "Q8_0")
        quantize(model, "int8")
        engine = Engine(model, Mute(), [], rows=1, length=PROMPT + NEW, compile=True)
        seconds_of(engine, 1, NEW)  # compiles
        with bench_llama.opened(file, threads, PROMPT + NEW) as peer:
            peer.generate(ids.tolist(), NEW)  # brings the file into memory
            ours, theirs = interleaved(
                lambda: tokens_per_second(partial(seconds_of, engine), 1),
                lambda: tokens_per_second(lambda _, new_tokens: peer.seconds(ids.tolist(), new_tokens), 1),
                rounds,
            )
    conditions = f"{shape}, compiled; {PROMPT} + {NEW} tokens, {threads} threads; peer: {bench_llama.build()}"
    return Row("int8 decode, 1 at once, beside llama.cpp Q8_0", ours, theirs, "tokens/s", conditions, LLAMA_TARGET)


def _row(
    name: str,
    ours: Callable[[int, int], float],
    peer: Callable[[int, int], float],
    rows: int,
    rounds: int,
    target: str = "",
    shape: str = SHAPE,
) -> Row:
    fast, theirs = interleaved(lambda: tokens_per_second(ours, rows), lambda: tokens_per_second(peer, rows), rounds)
    conditions = f"{shape}; {PROMPT} + {NEW} tokens a row, {torch.get_num_threads()} threads"
    return Row(name, fast, theirs, "tokens/s", conditions, target)


def tokens_per_second(seconds: Callable[[int, int], float], rows: int) -> float:
    """From the seconds that so many rows take for 1 new token and for all of them."""
    first, whole = seconds(rows, 1), seconds(rows, NEW)
    return rows * (NEW - 1) / (whole - first)


def engine_seconds(model: VLMModel, rows: int, new_tokens: int, beams: int = 1) -> float:
    """Of an engine of their own, uncompiled."""
    engine = Engine(model, Mute(), [], rows=rows * beams, length=PROMPT + NEW)
    return seconds_of(engine, rows, new_tokens, beams)


def seconds_of(engine: Engine, rows: int, new_tokens: int, beams: int = 1) -> float:
    """Requests with a picture each, if the model looks at all; all there from the start."""
    ids, pixels = inputs(rows)
    looks = engine.model.config.image_token_id is not None
    for words, picture in zip(ids.tolist(), pixels, strict=True):
        engine.add(Prompt(words, picture[None] if looks else None), Decoding(new_tokens, num_beams=beams))
    start = time.perf_counter()
    while engine.busy:
        engine.step()
    return time.perf_counter() - start


def generate_seconds(model: VLMModel, rows: int, new_tokens: int, beams: int = 1) -> float:
    """The same by Hugging Face's loop."""
    ids, pixels = inputs(rows)
    start = time.perf_counter()
    how = _greedy(new_tokens) | {"num_beams": beams}
    model.generate(ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, **how)
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


def ready(model: VLMModel, at_once: int) -> VLMModel:
    """The model as `vlm.load` hands it out, in place."""
    lay_out(at_once, model.language_model, model.adapters)
    return model


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


def half_billion() -> VLMModel:
    """A language model of half a billion."""
    return qwen3(HALF_BILLION)


def qwen3(shape: dict[str, int]) -> VLMModel:
    """A Qwen3 shape with random weights, and as little of a composite around it as there can be."""
    tower = {"patch_size": 16, "embed_dim": 64, "depth": 1, "num_heads": 1}
    config = VLMConfig(
        vision={"name": "timm:vit_tiny_patch16_224", "image_size": (32, 32), "kwargs": tower},
        text_config=Qwen3Config(**shape),
        adapter={"layers": (0,), "feed_forward": 0, "heads": 1, "head_dim": 64},
    )
    return VLMModel(config).eval()


def _shape(model: VLMModel) -> str:
    millions = sum(weight.numel() for weight in model.language_model.parameters()) / 1e6
    return f"Qwen3 shape of {millions:,.0f} M, text alone"


def weights_read(model: VLMModel) -> int:
    """Bytes of the language model's weights that one token passes: all but the rows of the embedding that it is not."""
    parts = [part for part in model.language_model.modules() if not isinstance(part, nn.Embedding)]
    plain = [weight for part in parts for weight in part.parameters(recurse=False)]
    rounded = [kept for part in parts if isinstance(part, QuantizedLinear) for kept in (part.values, part.scales)]
    return sum(weight.numel() * weight.element_size() for weight in (*plain, *rounded))


def bandwidth() -> float:
    """Bytes a second that memory lets this process read, by a sum over what no cache holds."""
    data = torch.ones(BANDWIDTH_BYTES // 4)
    start = time.perf_counter()
    data.sum()
    return BANDWIDTH_BYTES / (time.perf_counter() - start)
