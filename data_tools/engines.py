"""Who does the pieces of a job: the processes of this machine, or a cluster by name.

Knows processes. Knows nothing of jobs or of what is done.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any

from vlm.errors import RunError, UsageError
from vlm.machine import usable_cores

from .job import Engine
from .ray_engine import RayEngine

AHEAD = 4  # pieces that wait for each process
WATCH = 0.5  # seconds between two looks at whether the process that hands out pieces is still there


def make_engine(name: str = "local", processes: int | None = None) -> Engine:
    """The engine of a name, `local` or `ray`, that does at most so many pieces at once; by default as many as it has cores.

    Raises UsageError for another name, and for less than one process.
    """
    if name not in ENGINES:
        raise UsageError(f"engine {name!r} is not known; use one of {', '.join(ENGINES)}")
    _check_processes(processes)
    return ENGINES[name](processes)


def _check_processes(processes: int | None) -> None:
    if processes is not None and processes < 1:
        raise UsageError(f"{processes} processes; give at least 1")


class LocalEngine:
    """A pool of processes, one per usable core by default; with one, or for one item, the work is done right here.

    Raises UsageError for less than one process.
    """

    def __init__(self, processes: int | None = None) -> None:
        _check_processes(processes)
        self.processes = processes or usable_cores()

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Generator[Any, None, None]:
        """The results of `function` in the order of `items`; raises what it raised, RunError where a process died."""
        items = iter(items)
        first = list(islice(items, 2))
        items = chain(first, items)
        if self.processes == 1 or len(first) < 2:
            yield from map(function, items)
            return
        # Forked where that exists: a fresh interpreter would take longer to import the package than most pieces take.
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
        context = multiprocessing.get_context(method)
        with ProcessPoolExecutor(self.processes, context, _end_with, (os.getpid(),)) as pool:
            waiting: deque[Future] = deque()
            try:
                for item in items:
                    waiting.append(pool.submit(function, item))
                    if len(waiting) >= AHEAD * self.processes:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            except BrokenProcessPool:
                raise RunError("a worker process died, of memory perhaps; run the command again to go on") from None
            finally:
                pool.shutdown(cancel_futures=True)


def _end_with(parent: int) -> None:
    """Have this process end when its parent is gone: it would wait for more pieces, and keep the job's lock, for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


ENGINES: dict[str, type[LocalEngine] | type[RayEngine]] = {"local": LocalEngine, "ray": RayEngine}
