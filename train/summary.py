"""A table of what trains and what is frozen, part by part.

Knows a model's parameters, their names and their learning rates. Knows nothing of optimizers or objectives.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from vlm.quantization import layers
from vlm.quantized_linear import QuantizedLinear

from .config_stage import Stage
from .optimization import factor_of

HEADINGS = ("part", "parameters", "trainable", "dtype", "lr")


@dataclass
class _Part:
    total: int = 0
    trainable: int = 0
    dtypes: set[str] = field(default_factory=set)
    rates: set[float] = field(default_factory=set)

    def add_quantized(self, layer: QuantizedLinear) -> None:
        self.total += layer.in_features * layer.out_features
        self.dtypes.add(layer.scheme)

    def add(self, parameter: nn.Parameter, rate: float) -> None:
        # Under ZeRO-3 a parameter is an empty shard that remembers its size as `ds_numel`.
        size = getattr(parameter, "ds_numel", parameter.numel())
        self.total += size
        self.trainable += size if parameter.requires_grad else 0
        self.dtypes.add(str(parameter.dtype).removeprefix("torch."))
        if parameter.requires_grad:
            self.rates.add(rate)


def training_table(model: nn.Module, stage: Stage) -> str:
    """One row for each part of `model` (its children, and its own parameters together as "scalars"), and the sum."""
    parts: dict[str, _Part] = {}
    whole = _Part()
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0] if "." in name else "scalars"
        rate = stage.lr * factor_of(name, stage)
        parts.setdefault(part, _Part()).add(parameter, rate)
        whole.add(parameter, rate)
    for name, layer in layers(model):
        parts.setdefault(name.partition(".")[0], _Part()).add_quantized(layer)
        whole.add_quantized(layer)
    rows = [_row(name, part) for name, part in [*parts.items(), ("total", whole)]]
    return _aligned([HEADINGS, *rows])


def training_totals(model: nn.Module, stage: Stage, state_bytes: int) -> str:
    """How much trains, what the optimizer keeps for it over all ranks, what LoRA's adapter folder will hold, and what a
    quantized base takes on each rank."""
    whole, adapter, quantized = _Part(), 0, [layer for _, layer in layers(model)]
    for layer in quantized:
        whole.add_quantized(layer)
    for name, parameter in model.named_parameters():
        whole.add(parameter, stage.lr)
        adapter += 4 * parameter.numel() if "lora_" in name or parameter.requires_grad else 0
    told = f"trains {whole.trainable:,} of {whole.total:,} parameters; optimizer state {state_bytes:,} bytes"
    told += f"; adapter {adapter:,} bytes" if stage.lora is not None else ""
    if quantized:
        full = sum(4 * layer.in_features * layer.out_features for layer in quantized)
        held = sum(layer.bytes for layer in quantized)
        told += f"; {len(quantized)} quantized layers {held:,} bytes, {held / full:.2f} of float32"
    return told


def _row(name: str, part: _Part) -> tuple[str, ...]:
    if part.trainable == 0:
        trainable = "frozen"
    elif part.trainable == part.total:
        trainable = "all"
    else:
        trainable = f"{part.trainable:,} ({part.trainable / part.total:.1%})"
    rates = ", ".join(f"{rate:g}" for rate in sorted(part.rates)) or "–"
    return name, f"{part.total:,}", trainable, ", ".join(sorted(part.dtypes)), rates


def _aligned(rows: Iterable[tuple[str, ...]]) -> str:
    listed = list(rows)
    widths = [max(len(row[column]) for row in listed) for column in range(len(HEADINGS))]
    lines = []
    for index, (name, *cells) in enumerate(listed):
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *padded]))
        if index == 0 or index == len(listed) - 2:
            lines.append("─" * len(lines[-1]))
    return "\n".join(lines)
