"""How the float weights of linear layers lie in memory, for answering on a CPU: packed for several rows, or for one.

Knows the layouts, which layers gain by them, and how they become plain ones again. Knows nothing of quantized weights, or of
what a model is asked.

Why, by what `vlm bench kernels` measures (Zen 4, one thread, weights out of memory): the product of PyTorch's own layers, by
MKL, takes twice as long for 2 rows as for 1; oneDNN's from packed weights takes the same up to 8, and is ahead from 2 rows on.
At 1 row a weight that lies transposed is read fastest of all, and at 8 slowest; no layout serves both.

Shapes: N output features, K input features.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_WEIGHTS = 2**18  # numbers in a layer; in smaller ones what a call of oneDNN costs, 20 µs, is more than it saves
# Fewer rows are filled up to so many: oneDNN has a slower kernel for them, and at one row another order of summation.
LEAST_ROWS = 6
DTYPES = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Linear):
    """x Wᵀ + b, (…, K) -> (…, N): a linear layer that is packed while it is in evaluation mode on a CPU.

    There W is held in oneDNN's layout alone, and `weight` makes it anew at each use: change it by `load_state_dict`, or by
    assignment, not in place. A weight that another module uses as well stays beside the packed one. No gradient reaches
    W or b; they flow through to x. In training mode, on other devices and in other dtypes it is `torch.nn.Linear`.

    In float32 no row's result depends on the rows beside it, bit for bit. In bfloat16 it does in its last bit where oneDNN
    multiplies by AMX, which sums in another order for other numbers of rows.
    """

    packed: Packed | None

    def __init__(self, linear: nn.Linear, shared: bool = False) -> None:
        """Takes over the parameters of a linear layer. shared: its weight is another module's too."""
        nn.Module.__init__(self)
        self.out_features, self.in_features = linear.weight.shape
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.shared, self.learns = shared, linear.weight.requires_grad
        self.packed = None
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """(…, K) -> (…, N), in the dtype of the input."""
        packed = self.packed
        if packed is None or torch.is_autocast_enabled("cpu"):
            return F.linear(input, self.weight, self.bias)
        if torch.is_grad_enabled() and input.requires_grad:
            return cast(Tensor, _Product.apply(input, self))
        return packed(input, self.bias)

    # Where the weight is kept

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return self.packed.dense() if name == "weight" and found is None and self.packed is not None else found

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight":
            self.packed = None

    def pack(self) -> None:
        """Bring the weight into oneDNN's layout, where this machine multiplies from it."""
        weight = self._parameters["weight"]
        if weight is not None and _takes(weight):
            packed = Packed(weight.detach())
            self.learns = weight.requires_grad
            if not self.shared:
                self.weight = None  # type: ignore[assignment]
            self.packed = packed

    def unpack(self) -> None:
        """Bring the weight back into the layout of a linear layer."""
        if self._parameters["weight"] is None:
            self.weight = nn.Parameter(self.weight, requires_grad=self.learns)
        self.packed = None

    def train(self, mode: bool = True) -> PackedLinear:
        """As any module; what trains is not packed."""
        super().train(mode)
        if mode:
            self.unpack()
        else:
            self.pack()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        self.unpack()
        super()._apply(fn, recurse)
        return self.train(self.training)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)
        self.train(self.training)


class _Product(torch.autograd.Function):
    """The product with a gradient to the rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layer: PackedLinear) -> Tensor:
        assert layer.packed is not None, "it is this product that was asked for"
        ctx.layer = layer
        return layer.packed(rows, layer.bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.weight, None


class Packed:
    """A weight (N, K) in oneDNN's layout, by the operators that inductor packs weights with when it freezes a model.

    A graph of torch.compile can hold no such tensor; it holds the number under which `_PACKED` finds it.
    """

    def __init__(self, weight: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self.tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), LEAST_ROWS)
        self.number = next(_NUMBERS)
        _PACKED[self.number] = self

    def __call__(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """(…, K) -> (…, N)."""
        if torch.compiler.is_compiling():
            return packed_product(rows, bias, self.number, self.out_features)
        return self.product(rows, bias)

    def product(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """(…, K) -> (…, N)."""
        count = rows.numel() // self.in_features
        if count >= LEAST_ROWS:
            return _ONEDNN(rows, self.tensor, bias, "none", [], "")
        if not count:
            return rows.new_empty((*rows.shape[:-1], self.out_features))
        times = -(-LEAST_ROWS // count)  # one row is repeated by its strides, without a copy
        filled = rows.reshape(count, self.in_features).expand(times, -1, -1).reshape(-1, self.in_features)
        return _ONEDNN(filled, self.tensor, bias, "none", [], "")[:count].view(*rows.shape[:-1], self.out_features)

    def dense(self) -> Tensor:
        """(N, K), as it was packed."""
        return self.tensor.to_dense()

    def __reduce__(self) -> tuple[type[Packed], tuple[Tensor]]:
        return Packed, (self.dense(),)


_NUMBERS = itertools.count()
_PACKED: WeakValueDictionary[int, Packed] = WeakValueDictionary()
_ONEDNN = torch.ops.mkldnn._linear_pointwise.default


def _packed_product(rows: Tensor, bias: Tensor | None, number: int, out_features: int) -> Tensor:
    return _PACKED[number].product(rows, bias)


_LIBRARY = torch.library.Library("vlm", "FRAGMENT")
_LIBRARY.define("packed_product(Tensor rows, Tensor? bias, int number, int out_features) -> Tensor")
_LIBRARY.impl("packed_product", _packed_product, "CPU")
torch.library.register_fake(
    "vlm::packed_product",
    lambda rows, bias, number, out_features: rows.new_empty((*rows.shape[:-1], out_features)),
    lib=_LIBRARY,
)
packed_product = torch.ops.vlm.packed_product  # `Packed.product` as one node of a compiled graph


def _takes(weight: Tensor) -> bool:
    """Whether this machine multiplies from a packed weight of this kind."""
    if weight.device.type != "cpu" or weight.dtype not in DTYPES or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


# The layers of a model


def pack(*parts: nn.Module) -> None:
    """Replace the linear layers in parts of a model that are large enough, in place and one after another, by packed ones.

    A head that shares its weight with the token embedding is packed too: the embedding keeps the plain weight, since its rows
    are looked up, and the head has a second one. In a Qwen3 shape of 0.5 B with 152 k words that is 30 % more memory, and a
    quarter less time for a token of 8 rows.
    """
    for part in parts:
        linear = [(name, module) for name, module in part.named_modules() if type(module) is nn.Linear]
        owners = Counter(id(weight) for _, weight in part.named_parameters(remove_duplicate=False))
        for name, module in linear:
            if module.weight.numel() >= LEAST_WEIGHTS and _takes(module.weight):
                part.set_submodule(name, PackedLinear(module, shared=owners[id(module.weight)] > 1))


def transpose(*parts: nn.Module) -> None:
    """Let the weights of linear layers in parts of a model lie transposed, (K, N), where one row is read faster so: float32,
    large, N ≥ K. Shapes and names stay. A weight that is shared stays as it is, for its rows are looked up.
    """
    for part in parts:
        owners = Counter(id(weight) for _, weight in part.named_parameters(remove_duplicate=False))
        for layer in part.modules():
            if type(layer) is nn.Linear and owners[id(layer.weight)] == 1 and _gains_transposed(layer.weight):
                layer.weight.data = layer.weight.data.t().contiguous().t()


def _gains_transposed(weight: Tensor) -> bool:
    large = weight.numel() >= LEAST_WEIGHTS and weight.shape[0] >= weight.shape[1]
    return large and weight.device.type == "cpu" and weight.dtype == torch.float32


def lay_out(at_once: int, *parts: nn.Module) -> None:
    """Ready parts of a model in evaluation mode for so many rows at once: `transpose` for one, `pack` for more."""
    for part in parts:
        unpack(part)
    if at_once > 1:
        pack(*parts)
    else:
        transpose(*parts)


def unpack(model: nn.Module) -> None:
    """Make every linear layer a plain one whose weight lies as ever, in place and one after another."""
    for layer in model.modules():
        if type(layer) is nn.Linear and not layer.weight.is_contiguous():
            layer.weight.data = layer.weight.data.contiguous()
    for name, module in [(name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear)]:
        module.unpack()
        plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        plain.weight, plain.bias = module.weight, module.bias
        model.set_submodule(name, plain.train(module.training))


def packed_layers(model: nn.Module) -> Iterator[PackedLinear]:
    """Those that are packed at present."""
    return (module for module in model.modules() if isinstance(module, PackedLinear) and module.packed is not None)
