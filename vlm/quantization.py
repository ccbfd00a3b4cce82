"""Quantizing a composite: which of its modules become int8 or int4, which are kept as they are and why, and what that saves.

Knows the parts of a composite by name and the linear layers of PyTorch and transformers. Knows nothing of rounding and
kernels (`vlm.quantized_linear`), files, or how good the outcome is.

Quantized are the linear layers of the language model, of the adapters and, if asked for, of the vision tower with its
resampler. Kept are gates, norms, embeddings, routers, fused expert weights (transformers keeps those of a layer in one 3-D
parameter that no linear layer owns), and the small projections into the contrastive space.

The head of a decoder is quantized. Where it shares its weight with the token embedding, the embedding stays, since its rows
are only looked up, and the head gets an int8 copy of its own. That adds a quarter of the embedding's bytes and saves reading
all of it at each token: in a Qwen3 shape of 0.5 B with 152 k words, a third of all that a token reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from vlm.adapters import GatedCrossAttention
from vlm.errors import UsageError
from vlm.packed_linear import packed_layers, unpack
from vlm.quantized_linear import SCHEMES, Int4Linear, Int8Linear, QuantizedLinear

PARTS, VISION = ("language_model", "adapters"), ("vision", "resampler")
ROUTERS = ("gate", "router", "shared_expert_gate")


@dataclass(frozen=True)
class Entry:
    """What became of one module that owns weights. scheme: None for a kept one, and then `why`.

    bytes: what it owns. before: of a quantized layer, what it owned in float32, a head that shared its weight too.
    """

    name: str
    scheme: str | None
    why: str
    bytes: int
    before: int


def check_scheme(scheme: str) -> None:
    """UsageError for what is no scheme."""
    if scheme not in SCHEMES:
        raise UsageError(f"quantization scheme {scheme!r} is unknown; choose {' or '.join(SCHEMES)}")


def quantize(model: Any, scheme: str, vision: bool = False, base: bool = False) -> None:
    """Replace a composite's linear layers by quantized ones, in place and one after another, and note it in `model.config`.

    base: only what LoRA trains beside (QLoRA, Dettmers et al. 2023): the language model, without its head. On the meta device
    the new layers are as empty as the old. Raises UsageError for an unknown scheme, and for a model that is quantized already.
    """
    check_scheme(scheme)
    if is_quantized(model):
        raise UsageError(
            f"the model is quantized to {model.config.quantization['scheme']} already; quantize the full-precision one"
        )
    unpack(model)
    for name, module in chosen(model, vision, base):
        model.set_submodule(name, quantized(module, scheme))
    _untie(model)
    model.config.quantization = {"scheme": scheme, "vision": vision, "base": base}


def chosen(model: Any, vision: bool = False, base: bool = False) -> list[tuple[str, nn.Module]]:
    """The layers that `quantize` replaces, with their names."""
    return [
        (name, module) for name, module in model.named_modules() if why_kept(model, name, module, vision, base) is None
    ]


def quantized(linear: nn.Module, scheme: str) -> QuantizedLinear:
    """The layer in int8 or int4; a layer whose widths do not fit int4 is int8."""
    weight: Any = linear.weight.t() if isinstance(linear, Conv1D) else linear.weight  # (N, K)
    fits = scheme != "int4" or Int4Linear.takes(weight.shape[1], weight.shape[0])
    layer = (SCHEMES[scheme] if fits else Int8Linear)(weight, linear.bias)  # type: ignore[arg-type]
    return layer.train(linear.training).requires_grad_(False)


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer is."""
    return next(layers(model), None) is not None


def pack(model: nn.Module) -> None:
    """Bring every quantized layer of a freshly loaded model into its kernel's layout, one after another."""
    for _, layer in layers(model):
        layer.pack()


def parameter_count(model: nn.Module) -> int:
    """How many numbers the model holds, those that are quantized or packed included."""
    quantized_layers = (module for module in model.modules() if isinstance(module, QuantizedLinear))
    held = [*quantized_layers, *(layer for layer in packed_layers(model) if not layer.shared)]
    inside = sum(layer.in_features * layer.out_features for layer in held)
    return inside + sum(parameter.numel() for parameter in model.parameters())


def layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """Every quantized layer, with its name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLinear))


def why_kept(model: Any, name: str, module: nn.Module, vision: bool, base: bool = False) -> str | None:
    """Why a module keeps its weights; None for a linear layer that is quantized."""
    part, last = name.partition(".")[0], name.rpartition(".")[2]
    if part in VISION and not vision:
        return "vision tower"
    if part == "matching_head":
        return "matching head"
    if part not in (*PARTS, *VISION):
        return "contrastive space"
    if base and part != "language_model":
        return "learns beside LoRA"
    if type(module) not in (nn.Linear, Conv1D, Int8Linear, Int4Linear):
        return _kind(module)
    if last in ROUTERS:
        return "router"
    if module is model.get_output_embeddings() and (base or model.config.reading == "masked"):
        return "head beside LoRA" if base else "head of an encoder"
    return None


def _kind(module: nn.Module) -> str:
    name = type(module).__name__
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, GatedCrossAttention):
        return "gates"
    for mark, kind in (("norm", "norm"), ("router", "router"), ("experts", "fused experts"), ("conv", "convolution")):
        if mark in name.lower():
            return kind
    return f"parameters of {name}"


def account(model: Any) -> list[Entry]:
    """Every module that owns weights, in order: quantized, or kept and why. Weights that modules share stand at the first.

    Asserts that each is the one of the two that the rules want it to be.
    """
    told = model.config.quantization or {}
    vision, base = bool(told.get("vision")), bool(told.get("base"))
    entries: list[Entry] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        owned = [tensor for tensor in _owned(module) if id(tensor) not in seen]
        seen |= {id(tensor) for tensor in owned}
        layer = module if isinstance(module, QuantizedLinear) else None
        if not owned:
            continue
        size = sum(_bytes(tensor) for tensor in owned)
        before = size
        if layer is not None:
            size += _bytes(layer.values) if layer.packed is not None else 0
            before = _full_bytes(layer)
        why = why_kept(model, name, module, vision, base)
        assert (layer is None) == (why is not None), f"{name} is {type(module).__name__}, and the rules say {why}"
        entries.append(Entry(name, layer.scheme if layer else None, why or "", size, before))
    return entries


def _owned(module: nn.Module) -> list[Tensor]:
    """Parameters and saved buffers of the module itself; what a kernel keeps is not among them."""
    hidden = module._non_persistent_buffers_set
    buffers = [tensor for name, tensor in module.named_buffers(recurse=False) if name not in hidden]
    return [*module.parameters(recurse=False), *buffers]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _full_bytes(layer: QuantizedLinear) -> int:
    bias = 0 if layer.bias is None else _bytes(layer.bias)
    return layer.in_features * layer.out_features * torch.float32.itemsize + bias


def _untie(model: Any) -> None:
    """A head that has a weight of its own is not tied when the model is saved and loaded."""
    if isinstance(model.get_output_embeddings(), QuantizedLinear):
        for config in (model.language_model.config, model.language_model.config.get_text_config()):
            config.tie_word_embeddings = False
        for owner in (model, model.language_model):
            owner.all_tied_weights_keys = owner.get_expanded_tied_weights_keys(all_submodels=owner is model)


def table(entries: list[Entry]) -> Table:
    """What was quantized, by scheme, and what was kept, by reason, with bytes, for a person to read."""
    shown = Table("", "modules", "MB", "MB as float32", "ratio", "such as")
    for label, group in groups(entries).items():
        now, full = sum(entry.bytes for entry in group), sum(entry.before for entry in group)
        ratio = f"{now / full:.3f}" if group[0].scheme else ""
        before = f"{full / 1e6:,.2f}" if group[0].scheme else ""
        shown.add_row(label, str(len(group)), f"{now / 1e6:,.2f}", before, ratio, group[0].name)
    return shown


def groups(entries: list[Entry]) -> dict[str, list[Entry]]:
    """Entries by scheme ("int8") or by reason ("kept: norm")."""
    found: dict[str, list[Entry]] = {}
    for entry in sorted(entries, key=lambda entry: entry.scheme is None):
        found.setdefault(entry.scheme or f"kept: {entry.why}", []).append(entry)
    return found
