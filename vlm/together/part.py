"""What a process holds of a model that several hold together, and what the first of them tells the others.

Knows devices, the process group and how a part is read. Knows nothing of pipes, or of when what is told.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist

from vlm.generation.lockstep import Step
from vlm.model import VLMModel
from vlm.processes import Share
from vlm.processing import VLMProcessor
from vlm.saving import read


@dataclass(frozen=True)
class Part:
    """One process's part. first: the GPU of the first process, None for CPUs; the others take the next ones. port: where the
    store listens that they meet at. dtype: as of `vlm.load`."""

    path: str
    dtype: str | torch.dtype
    processes: int
    first: int | None
    rank: int
    port: int

    def read(self, store: dist.Store) -> tuple[VLMModel, VLMProcessor]:
        """Join the group, and read; all of them do. Raises UsageError, as `vlm.saving.read`."""
        if self.first is None:
            Share(self.rank, self.processes).take("cpu")
        else:
            torch.cuda.set_device(self.first + self.rank)
        backend = "gloo" if self.first is None else "nccl"
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.processes)
        if self.first is None:
            # How a sum over many numbers is rounded depends on how many threads share them, and all shall choose alike.
            threads = torch.tensor(torch.get_num_threads())
            dist.all_reduce(threads, dist.ReduceOp.MIN)
            torch.set_num_threads(int(threads))
        with _local_rank((self.first or 0) + self.rank):
            return read(self.path, self.dtype, tensor_parallel=self.processes)


@contextmanager
def _local_rank(number: int) -> Iterator[None]:
    """transformers takes the GPU of that number, which it looks for where launchers tell it."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(number)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


# What is told


@dataclass(frozen=True)
class Make:
    """An engine, as of `VLM.engine`. number: what it is called from then on."""

    number: int
    options: dict[str, Any]


@dataclass(frozen=True)
class Take:
    """A step of the engine of that number."""

    number: int
    step: Step


@dataclass(frozen=True)
class Call:
    """A method of `VLM`."""

    name: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Told:
    """One of them. dropped: numbers of engines that nobody uses any more."""

    deed: Make | Take | Call
    dropped: tuple[int, ...]
