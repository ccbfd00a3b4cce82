"""What is read off a model while it trains: gates, gradients part by part, whether it looks, memory.

Knows the engine, its partitions of gradients and its forward pass. Knows nothing of files, schedules or when it is asked.
Nothing here changes what training does next, bit by bit. All are collective calls: every rank asks the same at once.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from deepspeed import DeepSpeedEngine, zero
from deepspeed.utils import safe_get_local_grad
from torch import Tensor, nn

from vlm.machine import peak_memory_gib
from vlm.model import VLMModel

from .batches import Batch, on_device
from .objectives import Plan
from .ranks import data_rank, largest, sums
from .tensor_parallel import is_counted

GIB = 2**30
# Part -> how the names of its parameters begin; "heads" are the projections into the shared space, and what else there is.
PARTS = {
    "vision": ("vision.", "image_positions", "resampler."),
    "adapters": ("adapters.",),
    "language_model": ("language_model.",),
    "heads": ("",),
}


def look(engine: DeepSpeedEngine, batch: Batch) -> dict[str, Any]:
    """After a step: memory, and of a joint stage gates and looking gap. batch: a micro-batch of this rank."""
    seen: dict[str, Any] = {"memory_gib": memory(engine.device)}
    if engine.module.stage.objective == "joint":
        told = gates(engine.module.model).items()
        branches = enumerate(("attention", "feed_forward"))
        seen["gates"] = {branch: {layer: pair[place] for layer, pair in told} for place, branch in branches}
        gap = looking_gap(engine, batch)
        seen |= {} if gap is None else {"looking_gap": gap}
    return seen


def gates(model: VLMModel) -> dict[str, tuple[float, float]]:
    """tanh of the attention and the feed-forward gate of each adapter, by its layer."""
    with zero.GatheredParameters([p for p in model.adapters.parameters() if hasattr(p, "ds_id")]):
        return model.gates()


def gradient_norms(engine: DeepSpeedEngine) -> dict[str, float]:
    """The norm of the step's gradient, part by part of those that train; their squares add up to that of the whole.

    Asked between a step's last backward pass and `engine.step()`, before clipping. Under ZeRO each rank adds up the squares
    of the partition it holds, so it costs one pass over memory and one number a part to send. With Muon, ZeRO-1 and 2 hold its
    updates in the gradients' place by then, as they do for the norm of the whole.
    """
    squares: dict[str, list[Tensor]] = defaultdict(list)
    names = {id(parameter): name for name, parameter in engine.module.model.named_parameters()}
    trained = [parameter for parameter in engine.module.model.parameters() if parameter.requires_grad]
    for parameter in trained:
        gradient = _own_gradient(engine, parameter)
        part = part_of(names[id(parameter)])
        squares[part] += [] if gradient is None else [torch.linalg.vector_norm(gradient, dtype=torch.float64).square()]
    parts = [part for part in PARTS if part in squares]
    own = [float(torch.stack(squares[part]).sum()) if squares[part] else 0.0 for part in parts]
    scale = float(getattr(engine.optimizer, "loss_scale", 1.0) or 1.0)
    return {part: value**0.5 / scale for part, value in zip(parts, sums(own, engine.device), strict=True)}


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, by its name."""
    return next(part for part, beginnings in PARTS.items() if name.startswith(beginnings))


def _own_gradient(engine: DeepSpeedEngine, parameter: nn.Parameter) -> Tensor | None:
    """That part of a gradient which no other rank counts; None where this rank has none."""
    if hasattr(parameter, "ds_id"):
        return safe_get_local_grad(parameter)
    if not is_counted(parameter):
        return None
    if not engine.zero_optimization():
        return parameter.grad if data_rank() == 0 else None
    linked: Any = parameter  # by ZeRO to the partition it lies in
    mapping = getattr(linked, "_hp_mapping", None)
    if mapping is None:
        return None
    gradient = mapping.get_lp_grad_fragment(linked._index_in_param_group).flatten()
    own = mapping.lp_fragment_address
    return gradient.narrow(0, own.start, own.numel) if gradient.numel() == parameter.numel() else gradient


@torch.no_grad()
def looking_gap(engine: DeepSpeedEngine, batch: Batch) -> float | None:
    """By how much the loss per target of a joint batch rises when each picture gives way to another one of the batch.

    The stand-in lies half the batch's pictures further on: with a picture or so a sample, it is another sample's. A model that
    does not look has a gap of 0 (a loss that falls is no evidence: text alone can make it fall). None where no rank holds two
    pictures. Without dropout, as in validation.
    """
    pictures = len(batch["pixel_values"])
    others = batch | {"pixel_values": batch["pixel_values"].roll(pictures // 2, 0)}
    engine.eval()
    true, shuffled = (_token_loss(engine, each) for each in (batch, others))
    engine.train()
    own = [shuffled - true, float(engine.module.targets(batch))] if pictures > 1 else [0.0, 0.0]
    gap, targets = sums(own, engine.device)
    return gap / targets if targets else None


def _token_loss(engine: DeepSpeedEngine, batch: Batch) -> float:
    """Summed over the targets of this rank, without a contrastive term: that one tells pictures apart by itself."""
    loss, logs = engine(on_device(batch, engine.device), Plan(1.0))
    return float(logs.get("token_loss", loss))


def memory(device: torch.device) -> dict[str, float]:
    """GiB of the rank that holds most: `host_peak` of a process; on GPUs `device`, allocated now, and `device_peak`."""
    own = {"host_peak": peak_memory_gib()}
    if device.type == "cuda":
        own["device"] = torch.cuda.memory_allocated(device) / GIB
        own["device_peak"] = torch.cuda.max_memory_allocated(device) / GIB
    return dict(zip(own, largest(list(own.values()), device), strict=True))
