"""`vlm bench kernels` and the quantized rows of `vlm bench decode`: what rounding the weights saves in time.

Knows the candidate kernels of PyTorch for a quantized linear layer, and a language model's shape to decode with. Knows
nothing of decoding engines.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import cycle
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3Config

from vlm.benchmark import Row, interleaved, seconds
from vlm.configuration import VLMConfig
from vlm.model import VLMModel
from vlm.quantization import quantize
from vlm.quantized_linear import GROUP, Int4Linear, Int8Linear

ROWS = (1, 8, 32)
SHAPES = ((768, 768), (1024, 3072), (3072, 1024), (4096, 4096))  # K, N
COLD_BYTES = 256 * 2**20  # more than any cache holds: every call finds its weight in memory
QWEN3_HALF_BILLION = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 22,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
Product = Callable[[Tensor], Tensor]


# Kernels


def bench_kernels(rounds: int = 15) -> list[Row]:
    """Each candidate's linear layer beside float32's, cold weights, in turns; this machine's threads. Kernels that are slower
    than a tenth of float32's speed at their first call are told by that call alone."""
    rows = []
    for in_features, out_features in SHAPES:
        linear = nn.Linear(in_features, out_features, bias=False).requires_grad_(False)
        for name, make in CANDIDATES.items():
            ours = _cold(linear, make, 1 if "int4" not in name else 2)
            peers = _cold(linear, _fp32, 0.25)
            for count in ROWS:
                rows.append(_kernel_row(name, ours, peers, torch.randn(count, in_features), out_features, rounds))
    return rows


def _kernel_row(name: str, ours: list[Product], peers: list[Product], x: Tensor, out_features: int, rounds: int) -> Row:
    mine, theirs = cycle(ours), cycle(peers)
    first = seconds(lambda: next(mine)(x)), seconds(lambda: next(theirs)(x))
    if first[0] < 10 * first[1]:
        first = interleaved(lambda: seconds(lambda: next(mine)(x)), lambda: seconds(lambda: next(theirs)(x)), rounds)
    conditions = f"{x.shape[0]} rows, {x.shape[1]} → {out_features}, {torch.get_num_threads()} threads; peer: fp32"
    return Row(name, first[0] * 1e6, first[1] * 1e6, "µs", conditions, less_is_better=True)


def _cold(linear: nn.Linear, make: Callable[[nn.Linear], Product], per_byte: float) -> list[Product]:
    """So many copies that the first is out of every cache when its turn comes again. per_byte: weights a byte."""
    size = linear.in_features * linear.out_features / per_byte
    return [make(linear) for _ in range(max(2, int(COLD_BYTES / size)))]


def _fp32(linear: nn.Linear) -> Product:
    return copy.deepcopy(linear)


def _onednn(linear: nn.Linear) -> Product:
    values, scale = Int8Linear.rounded(linear.weight)
    packed = torch.ops.onednn.qlinear_prepack(values, None)
    zero = torch.zeros(len(scale), dtype=torch.int32)

    def product(x: Tensor) -> Tensor:
        peak = x.abs().amax(dim=-1, keepdim=True)
        levels = (x * (127 / peak)).round_().add_(128).to(torch.uint8)
        plain: tuple = (None, 1.0, 0, torch.float32, "none", [], "")
        return torch.ops.onednn.qlinear_pointwise(levels, 1.0, 128, packed, scale, zero, *plain).mul_(peak / 127)

    return product


def _int_mm(linear: nn.Linear) -> Product:
    values, scale = Int8Linear.rounded(linear.weight)

    def product(x: Tensor) -> Tensor:
        peak = x.abs().amax(dim=-1, keepdim=True)
        return torch._int_mm((x * (127 / peak)).round_().to(torch.int8), values.t()) * (scale * (peak / 127))

    return product


def _int8pack(dtype: torch.dtype) -> Callable[[nn.Linear], Product]:
    def make(linear: nn.Linear) -> Product:
        values, scale = Int8Linear.rounded(linear.weight)
        return lambda x: torch._weight_int8pack_mm(x.to(dtype), values, scale.to(dtype))

    return make


def _int4_dynamic(linear: nn.Linear) -> Product:
    """That kernel's own rounding: symmetric, from -8 to 7, two values a byte."""
    groups = linear.weight.unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(dim=-1) / 7  # (N, K / G)
    levels = ((groups / scale[..., None]).round() + 8).flatten(1).to(torch.uint8)
    pairs = levels[:, 0::2] | levels[:, 1::2] << 4
    width, out = linear.in_features, linear.out_features
    packed = torch.ops.aten._dyn_quant_pack_4bit_weight(pairs, scale, None, GROUP, width, out)
    return lambda x: torch.ops.aten._dyn_quant_matmul_4bit(x, packed, GROUP, width, out)


def _int4_float32(linear: nn.Linear) -> Product:
    layer = Int4Linear(linear.weight, None)
    packed, scales = layer.packed, layer.scales.float()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales)


CANDIDATES: dict[str, Callable[[nn.Linear], Product]] = {
    "int8, as used": lambda linear: Int8Linear(linear.weight, None),
    "int8, oneDNN": _onednn,
    "int8, _int_mm": _int_mm,
    "int8, _weight_int8pack_mm fp32": _int8pack(torch.float32),
    "int8, _weight_int8pack_mm bf16": _int8pack(torch.bfloat16),
    "int4, as used": lambda linear: Int4Linear(linear.weight, None),
    "int4, _weight_int4pack_mm fp32": _int4_float32,
    "int4, _dyn_quant_matmul_4bit": _int4_dynamic,
}


# A whole model


def bench_quantized(rounds: int = 3, new_tokens: int = 16) -> list[Row]:
    """Tokens a second of plain `model.generate`, greedy, text alone: a Qwen3 shape of half a billion with random weights, int8
    and int4 beside its own float32, in turns, at batch 1 and 8."""
    model = half_billion()
    rows = []
    for scheme, targets in (("int8", {1: "≥ 3", 8: "≥ 4"}), ("int4", {})):
        smaller = copy.deepcopy(model)
        quantize(smaller, scheme)
        for batch in (1, 8):
            ours, peer = interleaved(
                partial(_tokens_per_second, smaller, batch, new_tokens),
                partial(_tokens_per_second, model, batch, new_tokens),
                rounds,
            )
            told = f"batch {batch}, generate, Qwen3 shape of {_millions(model)} M, {torch.get_num_threads()} threads; peer: fp32"
            rows.append(Row(f"{scheme} decode", ours, peer, "token/s", told, targets.get(batch, "")))
    return rows


def half_billion() -> VLMModel:
    """Random weights; one small adapter, for it is the text that is timed."""
    tower = {"patch_size": 16, "embed_dim": 64, "depth": 1, "num_heads": 1}
    config = VLMConfig(
        vision={"name": "timm:vit_tiny_patch16_224", "image_size": (32, 32), "kwargs": tower},
        text_config=Qwen3Config(**QWEN3_HALF_BILLION),
        adapter={"layers": (0,), "feed_forward": 0, "heads": 1, "head_dim": 64},
        image_token_id=3,
    )
    return VLMModel(config).eval()


def _tokens_per_second(model: VLMModel, batch: int, new_tokens: int) -> float:
    """Of decoding steps alone: the time of one more step count than another, so that the prompt falls out."""
    prompt = torch.randint(10, 1000, (batch, 16), generator=torch.Generator().manual_seed(0))

    def run(count: int) -> float:
        options: dict[str, Any] = {
            "do_sample": False,
            "min_new_tokens": count,
            "max_new_tokens": count,
            "pad_token_id": 0,
        }
        return seconds(lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **options))

    return batch * (new_tokens - 1) / (run(new_tokens) - median(run(1) for _ in range(2)))


def _millions(model: VLMModel) -> int:
    return round(sum(parameter.numel() for parameter in model.language_model.parameters()) / 1e6)
