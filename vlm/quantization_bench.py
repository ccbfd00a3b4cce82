"""`vlm bench kernels`: what packing or rounding the weights of a linear layer saves in time.

Knows the candidate kernels of PyTorch for a linear layer that does not learn. Knows nothing of models or of decoding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import cycle

import torch
from torch import Tensor, nn

from vlm.benchmark import Row, interleaved, seconds
from vlm.packed_linear import PackedLinear
from vlm.quantized_linear import GROUP, Int4Linear, Int8Linear

ROWS = (1, 8, 32)
SHAPES = ((768, 768), (1024, 3072), (3072, 1024), (4096, 4096), (768, 32_000))  # K, N; the last is a head
COLD_BYTES = 256 * 2**20  # more than any cache holds: every call finds its weight in memory
Product = Callable[[Tensor], Tensor]


# Kernels


def bench_kernels(rounds: int = 15) -> list[Row]:
    """Each candidate's linear layer beside float32's, or bfloat16's where its name begins so, cold weights, in turns; this
    machine's threads. Kernels that are slower than a tenth of the peer's speed at their first call are told by that alone."""
    rows = []
    for in_features, out_features in SHAPES:
        linear = nn.Linear(in_features, out_features, bias=False).requires_grad_(False)
        for name, make in CANDIDATES.items():
            ours = _cold(linear, make, next(density for kind, density in PER_BYTE.items() if name.startswith(kind)))
            peer = torch.bfloat16 if name.startswith("bf16") else torch.float32
            peers = _cold(linear, _plain(peer), 1 / peer.itemsize)
            for count in ROWS:
                x = torch.randn(count, in_features, dtype=peer)
                rows.append(_kernel_row(name, ours, peers, x, out_features, rounds))
    return rows


def _kernel_row(name: str, ours: list[Product], peers: list[Product], x: Tensor, out_features: int, rounds: int) -> Row:
    mine, theirs = cycle(ours), cycle(peers)
    first = seconds(lambda: next(mine)(x)), seconds(lambda: next(theirs)(x))
    if first[0] < 10 * first[1]:
        first = interleaved(lambda: seconds(lambda: next(mine)(x)), lambda: seconds(lambda: next(theirs)(x)), rounds)
    conditions = (
        f"{x.shape[0]} rows, {x.shape[1]} → {out_features}, {torch.get_num_threads()} threads; peer: {str(x.dtype)[6:]}"
    )
    return Row(name, first[0] * 1e6, first[1] * 1e6, "µs", conditions, less_is_better=True)


def _cold(linear: nn.Linear, make: Callable[[nn.Linear], Product], per_byte: float) -> list[Product]:
    """So many copies that the first is out of every cache when its turn comes again. per_byte: weights a byte."""
    size = linear.in_features * linear.out_features / per_byte
    return [make(linear) for _ in range(max(2, int(COLD_BYTES / size)))]


def _plain(dtype: torch.dtype) -> Callable[[nn.Linear], Product]:
    return lambda linear: copy.deepcopy(linear).to(dtype)


def _packed(dtype: torch.dtype) -> Callable[[nn.Linear], Product]:
    def make(linear: nn.Linear) -> Product:
        layer = PackedLinear(copy.deepcopy(linear).to(dtype).eval())
        return lambda x: layer(x.to(dtype))

    return make


def _onednn_plain(linear: nn.Linear) -> Product:
    weight = linear.weight.detach().clone()
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _transposed(linear: nn.Linear) -> Product:
    weight = linear.weight.detach().t().contiguous()
    return lambda x: x @ weight


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


PER_BYTE = {"fp32": 0.25, "bf16": 0.5, "int8": 1.0, "int4": 2.0}  # first word of a name -> weights a byte
CANDIDATES: dict[str, Callable[[nn.Linear], Product]] = {
    "fp32, packed, as used": _packed(torch.float32),
    "fp32, oneDNN, not packed": _onednn_plain,
    "fp32, transposed": _transposed,
    "bf16, packed, as used": _packed(torch.bfloat16),
    "int8, as used": lambda linear: Int8Linear(linear.weight, None),
    "int8, oneDNN": _onednn,
    "int8, _int_mm": _int_mm,
    "int8, _weight_int8pack_mm fp32": _int8pack(torch.float32),
    "int8, _weight_int8pack_mm bf16": _int8pack(torch.bfloat16),
    "int4, as used": lambda linear: Int4Linear(linear.weight, None),
    "int4, _weight_int4pack_mm fp32": _int4_float32,
    "int4, _dyn_quant_matmul_4bit": _int4_dynamic,
}
