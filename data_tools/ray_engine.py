"""Who does the pieces of a job: a Ray cluster.

Knows Ray. Knows nothing of jobs or of what is done.

Plain tasks, and not Ray Data: `ray.data.from_items` takes every item before the first is worked on, what a function
raises arrives as a `UserCodeException`, and results go through Arrow, which has types of its own. A task takes and gives
Python objects as they are, raises what was raised, and is begun again elsewhere when its node is lost.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
from collections import deque
from collections.abc import Callable, Generator, Iterable
from types import ModuleType
from typing import Any

from vlm.errors import RunError, UsageError

AHEAD = 4  # pieces for each core whose results may wait for one before them
PATIENCE = 60  # seconds given to a cluster that does not answer


class RayEngine:
    """Ray tasks, `processes` at a time; by default one for each core that the cluster has then.

    The cluster is the one that this process is connected to, or RAY_ADDRESS names, or runs on this machine, or one of
    this machine alone that is started and ends with the process. Every node needs this package, importable and the same,
    the folder that the command was started in, and, shared or by address, what is read and written; credentials are the
    node's own.
    """

    def __init__(self, processes: int | None = None) -> None:
        self.processes = processes

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Generator[Any, None, None]:
        """The results of `function` in the order of `items`; raises what it raised, RunError where the cluster failed.

        A piece whose node or process dies is done again, by Ray's own count three times. No more are handed out than are
        worked on, and none is called off: `ray.cancel` can end this process when a piece is done in that moment (Ray 2.60).
        """
        ray = _connected()
        begin, everywhere = ray.remote(_do).remote, ray.put(function)
        waiting: deque[Any] = deque()
        running: list[Any] = []
        try:
            for item in items:
                piece = begin(everywhere, os.getcwd(), item)
                waiting.append(piece)
                running.append(piece)
                most = self.processes or _cores(ray)
                while len(running) >= most:
                    _, running = ray.wait(running, fetch_local=False)
                while len(waiting) >= AHEAD * most:
                    yield _result(ray, waiting.popleft())
            while waiting:
                yield _result(ray, waiting.popleft())
        finally:
            if running:  # they would write into a folder that is removed
                ray.wait(running, num_returns=len(running), fetch_local=False)


def _connected() -> ModuleType:
    try:
        import ray
    except ImportError:
        raise UsageError("engine ray: Ray is not installed; pip install 'vlm[ray]'") from None
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "")
        try:
            _knock(address)
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        except (OSError, RuntimeError, ValueError) as error:
            place = f"RAY_ADDRESS {address}" if address else "the cluster of this machine"
            raise RunError(f"{place}: Ray cannot be reached ({_line(error)}); see `ray status`") from None
    return ray


def _knock(address: str) -> None:
    """Raise OSError where nobody listens at `HOST:PORT`: Ray would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()


def _do(function: Callable[[Any], Any], folder: str, item: Any) -> Any:
    """On a node: relative paths mean there what they mean where the command was given."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise RunError(
            f"{folder}: {error.strerror} on node {platform.node()}; start the command in a folder that every node has"
        ) from None
    return function(item)


def _cores(ray: ModuleType) -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _result(ray: ModuleType, task: Any) -> Any:
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise RunError(f"Ray lost a piece of the work ({_line(error)}); run the command again to go on") from None


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
