"""One of several servers with the same model, as a process of its own: `python -m vlm.serve.replica`.

Knows where it listens, its share of the machine, and that it may not outlive who started it. Knows nothing of the others.
It reads `Settings` from the first line of standard input and answers on standard output, once it can be asked, with
`{"error": null}`, or with what hindered it. When standard input ends, so does it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from vlm.api import VLM, load
from vlm.errors import RunError, UsageError
from vlm.processes import Share
from vlm.saving import config_of
from vlm.tensor_parallel import check
from vlm.together import load_together

from .app import Service
from .limits import Limits
from .server import Mortal

log = logging.getLogger("vlm.serve")


@dataclass(frozen=True)
class Settings:
    """What a server serves. device, quantize: as of `vlm.load`. length, compile, int8_cache: as of the engine.

    tensor_parallel: processes that hold one model together.
    """

    model: str
    name: str
    limits: Limits
    length: int | None = None
    device: str = "auto"
    quantize: str | None = None
    compile: bool = False
    int8_cache: bool = False
    tensor_parallel: int = 1

    def check(self, replicas: int = 1) -> None:
        """Raise UsageError for what does not go together, before anything is loaded or started."""
        together, gpus = self.tensor_parallel, torch.cuda.device_count()
        if together == 1:
            return
        for name, given in (("quantize", self.quantize), ("compile", self.compile)):
            if given:
                raise UsageError(f"{name} does not work with tensor_parallel {together}; leave one of them out")
        check(config_of(self.model), together)
        if self.device != "cpu" and gpus and replicas * together > gpus:
            raise UsageError(
                f"{replicas} replicas of tensor_parallel {together} take {replicas * together} GPUs and {gpus} are there; "
                "lower one"
            )

    def service(self) -> Service:
        """The model, loaded, and what answers for it."""
        if self.tensor_parallel > 1:
            model: VLM = load_together(self.model, self.tensor_parallel, device=self.device)
        else:
            rows = self.limits.rows
            model = load(self.model, device=self.device, quantize=self.quantize, at_once=rows)
        engine = {"length": self.length, "compile": self.compile, "int8_cache": self.int8_cache}
        return Service(model, self.name, self.limits, **engine)

    def line(self, path: Path, share: Share) -> bytes:
        """What a replica reads first: its settings, the Unix socket it listens on, and which of how many it is."""
        told = {"settings": dataclasses.asdict(self), "path": str(path), "share": dataclasses.asdict(share)}
        return json.dumps(told).encode() + b"\n"


def main() -> int:
    """Serve until a signal comes, the engine fails, or standard input ends; the exit code."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    asked = json.loads(sys.stdin.buffer.readline())
    path = Path(asked["path"])
    Thread(target=_end_with_parent, args=(path.parent,), daemon=True).start()
    try:
        service = _service(asked["settings"], Share(**asked["share"]))
    except (UsageError, RunError) as error:
        print(json.dumps({"error": str(error)}), file=told, flush=True)
        return 1
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(2048)
        server = Mortal(service)  # so that it is started again
        print(json.dumps({"error": None}), file=told, flush=True)
        server.run(sockets=[listening])
    if service.lost is not None:
        log.error("%s", service.lost)
    return int(service.health()["status"] == "dead")


def _service(settings: dict[str, Any], share: Share) -> Service:
    device = share.take(settings["device"], settings["tensor_parallel"])
    own = settings | {"device": device, "limits": Limits(**settings["limits"])}
    return Settings(**own).service()


def _end_with_parent(folder: Path) -> None:
    """Nobody else is left to remove the folder of the sockets when the parent was killed."""
    while os.read(0, 1024):  # not by sys.stdin, whose lock the interpreter wants when it ends
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    os._exit(main())  # nothing is left to put away, and the interpreter would take seconds to look for it
