"""Linear layers whose weights are int8 or int4: how they are rounded, kept, run and differentiated.

Knows numbers and the kernels that this machine has. Knows nothing of models, or of which of their layers are quantized.

Which kernels, by what `vlm bench kernels` measures (Zen 4 with VNNI, one thread, weights out of memory): for int8, fbgemm's
linear, at 1 row 1.7 times as fast as oneDNN's and as `torch._int_mm`, which packs the weight anew at each call and falls far
behind from 8 rows on; for int4, `_weight_int4pack_mm_for_cpu` in bfloat16, the only one there ahead of float32.

Shapes: N output features, K input features, G weights a group.
"""

from __future__ import annotations

import itertools
import warnings
from abc import ABC, abstractmethod
from typing import Any, ClassVar, cast
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 32  # G
TINY = torch.finfo(torch.float32).tiny
# fbgemm adds pairs of products in 16 bits where the processor lacks VNNI: 7 bits of activation then keep the sum exact.
LEVELS = 127 if torch.cpu._is_vnni_supported() else 63
CUDA_ROWS = 17  # the fewest that `torch._int_mm` takes there


class QuantizedLinear(nn.Linear, ABC):
    """x Wᵀ + b with W rounded, (…, K) -> (…, N). W is frozen; gradients flow through it to x.

    Two tensors stand for W in files, named by `VALUES` and `SCALES`. Where the kernel wants the values in a layout of its own,
    they are kept in that alone (`packed`), and brought back to be saved or moved. Scales keep their dtype whatever dtype the
    model takes. `weight` is the float32 matrix that they stand for, made anew at each use.
    """

    scheme: ClassVar[str]
    BITS: ClassVar[int]
    VALUES: ClassVar[str]
    SCALES: ClassVar[str]

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", bias)
        values, scales = self.rounded(weight)
        self.register_buffer(self.VALUES, values)
        self.register_buffer(self.SCALES, scales)
        self.packed: Any = None
        self.pack()

    @classmethod
    @abstractmethod
    def rounded(cls, weight: Tensor) -> tuple[Tensor, Tensor]:
        """float (N, K) -> values and scales as they are stored."""

    @property
    @abstractmethod
    def weight(self) -> Tensor:  # type: ignore[override]
        """(N, K), float32."""

    @abstractmethod
    def product(self, rows: Tensor) -> Tensor:
        """(…, K) -> (…, N) in the dtype of `rows`, without bias."""

    def forward(self, input: Tensor) -> Tensor:
        """(…, K) -> (…, N), in the dtype of the input, or of autocast, as any linear layer."""
        if input.dim() == 1:
            return self(input[None])[0]  # the kernels take rows
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        if torch.is_grad_enabled() and input.requires_grad:
            out = cast(Tensor, _Product.apply(input, self))
        else:
            out = self.product(input)
        return out if self.bias is None else out + self.bias

    # Where the values are kept

    @property
    def scales(self) -> Tensor:
        """As stored."""
        return getattr(self, self.SCALES)

    @property
    def values(self) -> Tensor:
        """As stored, whichever layout they are kept in."""
        return getattr(self, self.VALUES) if self.packed is None else self._unpacked()

    @property
    def qweight(self) -> Tensor:
        """Where peft looks for the device of a layer in few bits, twenty times a layer: `weight` would be made anew each time."""
        return self.scales

    @property
    def bytes(self) -> int:
        """What W takes, in files and in memory."""
        return self.in_features * self.out_features * self.BITS // 8 + self.scales.nbytes

    def pack(self) -> None:
        """Bring the values into the kernel's layout, where this machine has one that wants it."""
        values = getattr(self, self.VALUES)
        if values is not None and values.device.type == "cpu" and self._has_layout():
            self.packed = self._packed(values)
            setattr(self, self.VALUES, None)

    def _unpack(self) -> None:
        setattr(self, self.VALUES, self.values)
        self.packed = None

    @abstractmethod
    def _has_layout(self) -> bool:
        """Whether the kernel of this machine wants the values in a layout of its own."""

    @abstractmethod
    def _packed(self, values: Tensor) -> Any:
        """The values in that layout."""

    @abstractmethod
    def _unpacked(self) -> Tensor:
        """The values as stored, from `packed`."""

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        self._unpack()
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            setattr(self, self.SCALES, scales.to(self.scales.device))
        self.pack()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + self.VALUES] = self.values

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._unpack()
        super()._load_from_state_dict(*args, **kwargs)
        self.pack()

    def extra_repr(self) -> str:
        """As of any linear layer, with the scheme."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.scheme}"


class _Product(torch.autograd.Function):
    """The product with everything rounded; backward as if the weight alone had been (a straight-through estimate)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.weight.to(grad.dtype), None


# int8


class Int8Linear(QuantizedLinear):
    """int8 weights, symmetric, one scale an output channel; int8 activations, one scale a row, rounded as they come.

    Sums are exact integers, and no row's scale depends on another row: batched equals single, bit for bit.
    """

    scheme, BITS = "int8", 8
    VALUES, SCALES = "weight_int8", "weight_scale"
    packed: _Packed | None

    @classmethod
    def rounded(cls, weight: Tensor) -> tuple[Tensor, Tensor]:
        """float (N, K) -> int8 (N, K) and float32 (N,); W ≈ value · scale."""
        weight = weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp_min(TINY) / 127
        return (weight / scale[:, None]).round().to(torch.int8), scale

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(N, K), float32."""
        return self.values.float() * self.scales[:, None]

    def product(self, rows: Tensor) -> Tensor:
        """(…, K) -> (…, N) in the dtype of `rows`, without bias."""
        rows_f32 = rows.float()
        peak = rows_f32.abs().amax(dim=-1, keepdim=True).clamp_min_(TINY)
        if self.packed is not None:
            out = self.packed(rows_f32 / peak).mul_(peak)
        else:
            levels = (rows_f32 / peak * 127).round_().to(torch.int8)
            out = self._integer_product(levels) * (self.scales * (peak / 127))
        return out.to(rows.dtype)

    def _integer_product(self, levels: Tensor) -> Tensor:
        """int8 (…, K) -> (…, N): exact integers, as float32."""
        rows = levels.flatten(0, -2)
        if rows.is_cuda and len(rows) < CUDA_ROWS:
            padded = F.pad(rows, (0, 0, 0, CUDA_ROWS - len(rows)))
            product = torch._int_mm(padded, self.values.t())[: len(rows)]
        else:
            product = torch._int_mm(rows, self.values.t())
        return product.float().unflatten(0, levels.shape[:-1])

    def _has_layout(self) -> bool:
        return torch.backends.quantized.engine in ("x86", "fbgemm")

    def _packed(self, values: Tensor) -> _Packed:
        return _Packed(values, self.scales)

    def _unpacked(self) -> Tensor:
        assert self.packed is not None
        return self.packed.values()


class _Packed:
    """A weight in fbgemm's layout. The only place that calls `torch.ops.quantized`, which PyTorch means to retire.

    A graph of torch.compile can hold no such object; it holds the number under which `_PACKED` finds it.
    """

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.out_features = len(scale)
        zeros = torch.zeros(len(scale), dtype=torch.int64)
        with warnings.catch_warnings(action="ignore"):  # of the retirement
            weight = torch._make_per_channel_quantized_tensor(values, scale.double(), zeros, 0)
            self.params = torch.ops.quantized.linear_prepack(weight, None)
        self.number = next(_NUMBERS)
        _PACKED[self.number] = self

    def __call__(self, rows: Tensor) -> Tensor:
        """float32 (…, K) in [-1, 1] -> (…, N): rounded to whole `LEVELS`, multiplied as integers, scaled by channel."""
        if torch.compiler.is_compiling():
            return int8_product(rows, self.number, self.out_features)
        return _FBGEMM(rows, 1 / LEVELS, 128, self.params)

    def values(self) -> Tensor:
        """int8 (N, K), as it was packed."""
        return torch.ops.quantized.linear_unpack(self.params)[0].int_repr()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Packed:
        return self  # never written to


_NUMBERS = itertools.count()
_PACKED: WeakValueDictionary[int, _Packed] = WeakValueDictionary()
_FBGEMM = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32


def _int8_product(rows: Tensor, number: int, out_features: int) -> Tensor:
    return _FBGEMM(rows, 1 / LEVELS, 128, _PACKED[number].params)


# By hand: what `torch.library.custom_op` adds to each call takes longer than a small product.
_LIBRARY = torch.library.Library("vlm", "FRAGMENT")
_LIBRARY.define("int8_product(Tensor rows, int number, int out_features) -> Tensor")
_LIBRARY.impl("int8_product", _int8_product, "CPU")
torch.library.register_fake(
    "vlm::int8_product",
    lambda rows, number, out_features: rows.new_empty((*rows.shape[:-1], out_features)),
    lib=_LIBRARY,
)
int8_product = torch.ops.vlm.int8_product  # `_Packed.__call__` as one node of a compiled graph


# int4


class Int4Linear(QuantizedLinear):
    """int4 weights, a scale and a zero for each group of 32 along an output channel; activations in bfloat16.

    For memory: 0.16 × float32. Values are stored two a byte, the even column in the lower half.
    """

    scheme, BITS = "int4", 4
    VALUES, SCALES = "weight_int4", "weight_scale_zero"
    packed: Tensor | None

    @staticmethod
    def takes(in_features: int, out_features: int) -> bool:
        """Whether widths fit: K whole groups, N a multiple of 16, as the CPU kernel asks."""
        return in_features % GROUP == 0 and out_features % 16 == 0

    @classmethod
    def rounded(cls, weight: Tensor) -> tuple[Tensor, Tensor]:
        """float (N, K) -> uint8 (N, K / 2) and bfloat16 (K / G, N, 2), scale and zero; W ≈ (level - 8) · scale + zero.

        The least and the greatest weight of a group are at levels 0 and 15.
        """
        groups = weight.detach().float().unflatten(1, (-1, GROUP))  # (N, K / G, G)
        low, high = groups.aminmax(dim=-1)
        scale = ((high - low) / 15).clamp_min(TINY).bfloat16().float()
        zero = (low + 8 * scale).bfloat16().float()
        levels = ((groups - zero[..., None]) / scale[..., None] + 8).round().clamp(0, 15).flatten(1).to(torch.uint8)
        scale_zero = torch.stack([scale, zero], dim=-1).transpose(0, 1).contiguous().bfloat16()
        return levels[:, 0::2] | levels[:, 1::2] << 4, scale_zero

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(N, K), float32."""
        scale, zero = self.scales.float().transpose(0, 1).unsqueeze(2).unbind(-1)  # each (N, K / G, 1)
        groups = _levels(self.values).unflatten(1, (-1, GROUP))
        return ((groups - 8.0) * scale + zero).flatten(1)

    def product(self, rows: Tensor) -> Tensor:
        """(…, K) -> (…, N) in the dtype of `rows`, without bias."""
        if self.packed is None:
            return F.linear(rows, self.weight.to(rows.dtype))
        flat = rows.reshape(-1, self.in_features).bfloat16()
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, GROUP, self.scales)
        return out.to(rows.dtype).unflatten(0, rows.shape[:-1])

    def _has_layout(self) -> bool:
        return True

    def _packed(self, values: Tensor) -> Tensor:
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(_levels(values).int(), 1)

    def _unpacked(self) -> Tensor:
        """The layout differs from processor to processor: it is read off what becomes of each value's own index."""
        assert self.packed is not None
        size = self.out_features * self.in_features
        index = torch.arange(size).view(self.out_features, self.in_features)
        places = torch.zeros(size, dtype=torch.int64)
        for shift in range(0, size.bit_length(), 4):
            digit = torch.ops.aten._convert_weight_to_int4pack_for_cpu((index >> shift & 15).int(), 1)
            places |= _levels(digit).flatten().long() << shift
        levels = torch.empty(size, dtype=torch.uint8)
        levels[places] = _levels(self.packed).flatten()
        levels = levels.view(self.out_features, self.in_features)
        return levels[:, 0::2] | levels[:, 1::2] << 4


def _levels(pairs: Tensor) -> Tensor:
    """uint8 (N, K / 2), two values a byte -> uint8 (N, K), one a byte."""
    return torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(1)


SCHEMES: dict[str, type[QuantizedLinear]] = {kind.scheme: kind for kind in (Int8Linear, Int4Linear)}
