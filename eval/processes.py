"""Several processes that answer for one run, each its share of the parts.

Knows how processes are started, which device each takes, and how the first failure is told. Knows nothing of what is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from vlm.api import load
from vlm.errors import RunError, UsageError
from vlm.machine import usable_cores


@dataclass(frozen=True)
class Share:
    """The parts of one of several processes: every `processes`-th, so that all have as many."""

    process: int = 0
    processes: int = 1

    def of(self, parts: int) -> range:
        """The numbers of this process's parts."""
        return range(self.process, parts, self.processes)


def answer_in_processes(answer: Callable[..., None], model: Any, plan: Any, kept: Path, processes: int) -> None:
    """Call `answer(model, plan, kept, share)` in so many processes, each with the model loaded from its path; wait for all.

    Raises the first failure, and UsageError for a model that has no path.
    """
    if not isinstance(model, str | Path):
        raise UsageError(f"processes is {processes} and the model is in memory; give its path, or 1 process")
    shares = [Share(process, processes) for process in range(processes)]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        running = [pool.submit(_work, answer, str(model), plan, kept, share) for share in shares]
        try:
            for one in as_completed(running):
                one.result()
        except BrokenProcessPool:
            raise RunError(
                f"one of {processes} processes was killed; if memory ran out, lower batch or processes; "
                "what is answered is kept, run it again to go on"
            ) from None


def _work(answer: Callable[..., None], model: str, plan: Any, kept: Path, share: Share) -> None:
    gpus = torch.cuda.device_count()
    if not gpus:
        torch.set_num_threads(max(1, usable_cores() // share.processes))
    answer(load(model, device=f"cuda:{share.process % gpus}" if gpus else "cpu"), plan, kept, share)
