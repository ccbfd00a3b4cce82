"""What the micro-batches of one optimizer step must know of each other before the first of them runs.

Knows the engine's forward pass and the ranks. Knows nothing of schedules, optimizers or the log.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from deepspeed import DeepSpeedEngine
from torch import distributed as dist

from .batches import Batch, on_device
from .contrast import RandomState, whole_step
from .objectives import Plan
from .ranks import sums


def prepare(engine: DeepSpeedEngine, batches: Sequence[Batch]) -> list[Plan]:
    """The plan of each micro-batch of a step; a collective call.

    Where an objective compares pairs over several micro-batches, all of them are embedded here, without a graph.
    """
    objective, device = engine.module, engine.device
    own = [sum(objective.targets(batch) for batch in batches), sum(objective.matches(batch) for batch in batches)]
    parts = len(batches) * dist.get_world_size()
    mean_targets, mean_matches = (max(1.0, everywhere) / parts for everywhere in sums(own, device))
    if len(batches) == 1 or not objective.compares:
        return [Plan(mean_targets, mean_matches=mean_matches)] * len(batches)
    pairs, randoms = [], []
    with torch.no_grad():
        for batch in batches:
            randoms.append(RandomState.now(device))
            pairs.append(engine(on_device(batch, device), None))
    return [Plan(mean_targets, part, mean_matches) for part in whole_step(pairs, randoms)]
