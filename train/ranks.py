"""The processes that train together: joining them, and numbers that all of them must agree on.

Knows launchers' environment variables, DeepSpeed's start and the process group. Knows nothing of models or data.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections import Counter
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups
from torch import distributed as dist

from vlm.errors import UsageError


def join(tensor_parallel: int = 1) -> None:
    """Join the ranks that torchrun, deepspeed or `vlm train` started, or be the only one. Calling it again does nothing.

    tensor_parallel: so many neighbouring ranks hold one model together, and read the same batches. Raises UsageError where
    that does not divide the processes, or is another number than these processes have begun with.
    """
    _meet()
    processes, formed = dist.get_world_size(), copies()
    if processes % tensor_parallel:
        raise UsageError(
            f"tensor_parallel {tensor_parallel} does not divide {processes} processes; start a multiple of {tensor_parallel}"
        )
    if formed not in (1, tensor_parallel):
        raise UsageError(
            f"these processes trained with tensor_parallel {formed} before, and cannot with {tensor_parallel}; start new ones"
        )
    if tensor_parallel > 1:
        groups._init_tp_mesh_device(tensor_model_parallel_size=tensor_parallel)


def _meet() -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it misses CUDA, which a CPU has not
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the tokenizer is used in forked data workers
    if dist.is_initialized():
        return
    # On CPUs DeepSpeed would compile an op for inference at its start, which takes a C++ compiler; training never calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:
        # Alone: DeepSpeed takes over a group that is there, and asks for no address then.
        os.environ.setdefault("LOCAL_RANK", "0")
        backend = get_accelerator().communication_backend_name()
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    except RuntimeError as error:
        if "address already in use" not in str(error).lower():
            raise
        port = os.environ.get("MASTER_PORT")
        raise UsageError(f"port {port} is in use; start with another --master_port") from None
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def is_main() -> bool:
    """Whether this is the rank that writes files and speaks."""
    return dist.get_rank() == 0


def copies() -> int:
    """How many ranks hold one model together: each of them sees the same batches, and counts them in sums over ranks."""
    formed = groups._TENSOR_MODEL_PARALLEL_GROUP is not None
    return groups.get_tensor_model_parallel_world_size() if formed else 1


def data_ranks() -> int:
    """Over how many ranks, or groups of them that hold one model together, the samples of a batch are divided."""
    return dist.get_world_size() // copies()


def data_rank() -> int:
    """Which of them this is."""
    return dist.get_rank() // copies()


def data_group() -> dist.ProcessGroup | None:
    """One rank of each of them, whose batches are together those of a step; None: all ranks."""
    return groups.get_data_parallel_group() if copies() > 1 else None


def sums(values: list[float], device: torch.device) -> list[float]:
    """Each value summed over ranks, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def largest(values: list[float], device: torch.device) -> list[float]:
    """The largest of each value over ranks, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def joined(own: list[Any]) -> list[Any]:
    """The lists of all ranks, one after the other."""
    gathered: list[list[Any]] = [[]] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return [item for rank in gathered for item in rank]


def merged(counts: Counter[str]) -> Counter[str]:
    """Counts of batches of all ranks together, under whatever names each of them met."""
    gathered: list[Counter[str]] = [Counter()] * data_ranks()
    dist.all_gather_object(gathered, counts, group=data_group())
    return sum(gathered, Counter())
