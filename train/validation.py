"""How well the model does on held-out data while it trains.

Knows batches and the engine's forward pass. Knows nothing of schedules, files or what is done with the numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import distributed as dist

from .batches import Batch, on_device
from .gauges import gates
from .ranks import merged, sums
from .step import prepare


@torch.no_grad()
def validate(engine: DeepSpeedEngine, batches: Sequence[Batch]) -> dict[str, Any]:
    """Loss and logged numbers over `batches` of every rank, as one large step would give them; a collective call.

    joint: also `accuracy`, for each type of question the share whose answer tokens are all predicted right, each from the
    true ones before it, over `asked` questions; and `gates`, tanh of attention and feed-forward gate of each adapter. clm
    and mlm: also `perplexity`, e to the mean loss of a predicted token.
    """
    objective, device = engine.module, engine.device
    totals: Counter[str] = Counter()
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    engine.eval()
    for batch, plan in zip(batches, prepare(engine, batches), strict=True):
        loss, logs = engine(on_device(batch, device), plan)
        documents_right = logs.pop("documents_right", None)
        totals.update({"loss": float(loss)} | {name: float(value) for name, value in logs.items()})
        if documents_right is not None:
            _count(batch["question_types"], documents_right.tolist(), right, asked)
    engine.train()
    parts = len(batches) * dist.get_world_size()
    means = sums([total / parts for total in totals.values()], device)
    result: dict[str, Any] = dict(zip(totals, means, strict=True))
    if objective.stage.objective in ("clm", "mlm"):
        result["perplexity"] = float(torch.tensor(result.get("token_loss", result["loss"])).exp())
    right, asked = merged(right), merged(asked)
    if asked:
        result["accuracy"] = {kind: right[kind] / asked[kind] for kind in sorted(asked)}
        result["asked"] = dict(sorted(asked.items()))
    if engine.module.stage.objective == "joint":
        result["gates"] = gates(objective.model)
    return result


def _count(types: list[list[str | None]], rights: list[list[bool]], right: Counter[str], asked: Counter[str]) -> None:
    for row_types, row_right in zip(types, rights, strict=True):
        for kind, is_right in zip(row_types, row_right, strict=False):
            if kind is not None:
                asked[kind] += 1
                right[kind] += is_right
