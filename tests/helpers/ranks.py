"""Processes that train together and start warm: forked from a server that has imported what they need.

Knows the environment that a launcher gives its ranks. Knows nothing of what they do. Started anew, each of them would spend
eight seconds on imports.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

import torch
from torch import distributed as dist

LIMIT = 600  # seconds until ranks that wait for one another are a failure
FORKS = multiprocessing.get_context("forkserver")
# DeepSpeed imports the second when it starts, and compiles it.
FORKS.set_forkserver_preload(["vlm.train.loop", "deepspeed.runtime.zero.muon.muon_optimizer"])


def run_ranks(count: int, program: str, *arguments: str) -> None:
    """`python program arguments`, or -m where it is no file, in so many ranks; fails with what they said where one fails."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here, and no rank's
        "WORLD_SIZE": str(count),
    }
    with tempfile.TemporaryDirectory() as folder:
        told = [Path(folder, str(rank)) for rank in range(count)]
        ranks = []
        for rank, log in enumerate(told):
            given = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(FORKS.Process(target=_run, args=(given, log, program, *arguments)))
        try:
            for rank in ranks:
                rank.start()
            end = time.monotonic() + LIMIT
            while running := [rank.sentinel for rank in ranks if rank.exitcode is None]:
                if any(rank.exitcode for rank in ranks) or time.monotonic() > end:
                    break
                wait(running, timeout=1)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        codes = [rank.exitcode for rank in ranks]
        assert codes == [0] * count, f"ranks ended with {codes}:\n" + "\n".join(log.read_text()[-3000:] for log in told)


def _run(given: dict[str, str], log: Path, program: str, *arguments: str) -> None:
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    gc.freeze()
    os.environ.update(given)
    sys.argv = [program, *arguments]
    torch.set_num_threads(1)
    run = runpy.run_path if program.endswith(".py") else runpy.run_module
    run(program, run_name="__main__")
    if dist.is_initialized():
        dist.destroy_process_group()  # as the end of a process does that was not forked
