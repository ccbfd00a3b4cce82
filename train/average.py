"""An exponential moving average of the weights that train (Polyak and Juditsky 1992; as in DDPM, Ho et al. 2020, appendix B).

Knows where the engine holds the float32 masters of its weights. Knows nothing of steps, losses or models.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor
from torch import distributed as dist

from vlm.errors import UsageError


class Average:
    """The moving average of an engine's masters, in float32, on each rank of those that it holds itself.

    Under ZeRO-1, 2 and 3 that is a rank's own partition: 4 bytes a parameter over the number of ranks. Starts as the weights
    are now; each update moves it by 1 - `decay` of the way to them.
    """

    def __init__(self, engine: DeepSpeedEngine, decay: float) -> None:
        self.engine, self.decay = engine, decay
        self.values = [master.detach().clone() for master in _masters(engine)]

    @torch.no_grad()
    def update(self) -> None:
        """After a step."""
        torch._foreach_lerp_(self.values, _masters(self.engine), 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model has the average for its weights; afterwards, bit by bit, those it had. A collective call."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Let average and weights change places; a collective call."""
        for value, master in zip(self.values, _masters(self.engine), strict=True):
            kept = master.clone()
            master.copy_(value)
            value.copy_(kept)
        _publish(self.engine)

    def save(self, folder: Path) -> None:
        """Write this rank's part into `folder`."""
        torch.save(self.values, folder / _file())

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote on this rank. Raises UsageError where it wrote nothing."""
        path = folder / _file()
        if not path.is_file():
            raise UsageError(
                f"{folder} was written without ema, and the stage has ema {self.decay:g}; remove it to resume"
            )
        for value, saved in zip(self.values, torch.load(path, weights_only=True), strict=True):
            value.copy_(saved)


def _file() -> str:
    return f"average-rank{dist.get_rank()}.pt"


def _masters(engine: DeepSpeedEngine) -> list[Tensor]:
    """The float32 weights that this rank's optimizer moves: flat partitions under ZeRO, else the parameters themselves."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        return [flat.data for flat in optimizer.fp32_partitioned_groups_flat]
    if stage > 0:
        return [flat.data for flat in optimizer.single_partition_of_fp32_groups]
    return [parameter.data for parameter in engine.module.parameters() if parameter.requires_grad]


def _publish(engine: DeepSpeedEngine) -> None:
    """Bring the masters into the weights that the model computes with, as the end of a step does."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        optimizer.checkpoint_event_prologue()  # takes small weights apart that stay whole between steps
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    elif stage > 0:
        optimizer.update_lp_params()
