"""Starts one process per rank on this machine, and reports the first that fails.

Knows torch's elastic launcher and how many processes a machine takes. Knows nothing of what the processes compute.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from vlm.errors import RunError, UsageError
from vlm.machine import command_line, usable_cores


def process_count(gpus: int | None, processes: int | None) -> int:
    """How many ranks to start: what is asked for, else one per GPU, else one. Raises UsageError for what is absent."""
    if gpus is not None and processes is not None:
        raise UsageError(f"--gpus {gpus} and --processes {processes} are both given; give one")
    available = torch.cuda.device_count()
    if gpus is not None and not 1 <= gpus <= available:
        raise UsageError(
            f"--gpus is {gpus}, and {available} are there; use --gpus 1 to {available}, or --processes N on CPUs"
        )
    if processes is not None and processes < 1:
        raise UsageError(f"--processes is {processes}; it must be at least 1")
    return gpus or processes or max(1, available)


def launch(config: str, overrides: list[str], processes: int, resume: bool) -> None:
    """Run `python -m vlm.train` in `processes` processes and wait for them.

    Raises the first failure of a rank as UsageError or RunError, with the rank's own words.
    """
    arguments = [f"--launched={command_line()}", "--config", config, *(["--resume"] if resume else []), *overrides]
    for name in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="vlm-launch-") as folder:
        plan = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.2,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            with process_restored():
                # The launcher passes its own environment on; without this every rank would start a thread for every core.
                os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // processes)))
                elastic_launch(plan, sys.executable)("-m", "vlm.train", *arguments)
        except ChildFailedError as error:
            raise first_failure(error.failures) from None
        except SignalException as error:
            raise RunError(f"stopped by {error.sigval.name}; --resume goes on from the last checkpoint") from None


@contextmanager
def process_restored() -> Iterator[None]:
    """After the block the environment and every signal's handler are what they were before it.

    The elastic launcher leaves its own behind. What the process forks later would inherit its handlers and survive a SIGTERM;
    another launch would find the threads of this one.
    """
    environment = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if handler is not None and signal.getsignal(number) != handler:  # None: not set from Python
                    signal.signal(number, handler)


def first_failure(failures: dict[int, ProcessFailure]) -> UsageError | RunError:
    """The failure that says most: an error with a mend before a traceback, a traceback before a signal."""
    told = {rank: failure.error_file_data.get("message") for rank, failure in failures.items()}
    for kind in (UsageError, RunError):
        for message in told.values():
            name, _, text = _message(message).partition(": ")
            if name == kind.__name__:
                return kind(text)
    rank = min(failures, key=lambda rank: (not isinstance(told[rank], dict), failures[rank].timestamp))
    failure, message = failures[rank], told[rank]
    if isinstance(message, dict):
        sys.stderr.write(message.get("extraInfo", {}).get("py_callstack", ""))
        return RunError(f"rank {rank} failed: {_message(message).splitlines()[0]}")
    if failure.exitcode < 0:
        return RunError(
            f"rank {rank} was killed by {failure.signal_name()}; if memory ran out, lower micro_batch or the processes"
        )
    return RunError(f"rank {rank} ended with exit code {failure.exitcode}; its own output says why")


def _message(message: Any) -> str:
    if isinstance(message, dict):
        return str(message.get("message", ""))
    return message if isinstance(message, str) else json.dumps(message)
