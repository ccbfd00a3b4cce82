"""Several processes that share one work, and the machine: which cores or which GPU each takes, and what of the work.

Knows cores, threads, devices and how a process that was killed is told. Knows nothing of what the processes do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

from vlm.errors import RunError
from vlm.machine import usable_cores

Result = TypeVar("Result")


@dataclass(frozen=True)
class Share:
    """What one of several processes does: every `processes`-th part, so that all have as many."""

    process: int = 0
    processes: int = 1

    def of(self, parts: int) -> range:
        """The numbers of this process's parts."""
        return range(self.process, parts, self.processes)

    def cores(self, usable: list[int]) -> list[int]:
        """This process's of the cores: neighbours, as they share memory; one with others where there are too few."""
        first, last = (len(usable) * number // self.processes for number in (self.process, self.process + 1))
        return usable[first:last] or [usable[self.process % len(usable)]]

    def take(self, device: str = "auto", each: int = 1) -> str:
        """Keep this process to its GPU (of "auto" and "cuda", where there are any) or to its cores; the device's name.

        each: neighbouring GPUs that a process takes, of which this is the first.
        """
        gpus = torch.cuda.device_count()
        if gpus and device in ("auto", "cuda"):
            device = f"cuda:{self.process * each % gpus}"
            torch.cuda.set_device(device)
        if device.startswith("cuda"):
            return device
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, self.cores(sorted(os.sched_getaffinity(0))))
            torch.set_num_threads(usable_cores())
        else:
            torch.set_num_threads(max(1, usable_cores() // self.processes))
        return device


def in_processes(work: Callable[..., Result], processes: int, *arguments: Any, mend: str) -> list[Result]:
    """What `work(*arguments, share)` returns in each of so many new processes, in their order.

    Raises the first failure, and RunError with `mend` where a process was killed; the others are ended then.
    """
    # A process is used once: it has taken its cores for good.
    with ProcessPoolExecutor(processes, get_context("spawn"), max_tasks_per_child=1) as pool:
        running = [pool.submit(work, *arguments, Share(process, processes)) for process in range(processes)]
        try:
            for one in as_completed(running):
                one.result()
        except BrokenProcessPool:
            raise RunError(f"one of {processes} processes was killed; {mend}") from None
        except BaseException:
            _end(pool)
            raise
    return [one.result() for one in running]


def _end(pool: ProcessPoolExecutor) -> None:
    """End its processes: leaving a pool waits for all that they were given."""
    for process in list(pool._processes.values()):  # `terminate_workers` of Python 3.14
        process.terminate()
