"""One of several servers with the same model, as a process of its own: `python -m vlm.serve.replica`.

Knows where it listens, its share of the machine, and that it may not outlive who started it. Knows nothing of the others.
It reads `Settings` from the first line of standard input and answers on standard output, once it can be asked, with
`{"error": null}`, or with what hindered it. When standard input ends, so does it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from vlm.api import load
from vlm.errors import RunError, UsageError
from vlm.processes import Share

from .app import Service
from .limits import Limits
from .server import Server


@dataclass(frozen=True)
class Settings:
    """What a server serves. device, quantize: as of `vlm.load`. length, compile, int8_cache: as of the engine."""

    model: str
    name: str
    limits: Limits
    length: int | None = None
    device: str = "auto"
    quantize: str | None = None
    compile: bool = False
    int8_cache: bool = False

    def service(self) -> Service:
        """The model, loaded, and what answers for it."""
        model = load(self.model, device=self.device, quantize=self.quantize)
        engine = {"length": self.length, "compile": self.compile, "int8_cache": self.int8_cache}
        return Service(model, self.name, self.limits, **engine)

    def line(self, path: Path, share: Share) -> bytes:
        """What a replica reads first: its settings, the Unix socket it listens on, and which of how many it is."""
        told = {"settings": dataclasses.asdict(self), "path": str(path), "share": dataclasses.asdict(share)}
        return json.dumps(told).encode() + b"\n"


class _Server(Server):
    """Ends by itself when its engine has failed, so that it is started again."""

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._service.health()["status"] == "dead"


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
        server = _Server(service)
        print(json.dumps({"error": None}), file=told, flush=True)
        server.run(sockets=[listening])
    return int(service.worker.dead)


def _service(settings: dict[str, Any], share: Share) -> Service:
    own = settings | {"device": share.take(settings["device"]), "limits": Limits(**settings["limits"])}
    return Settings(**own).service()


def _end_with_parent(folder: Path) -> None:
    """Nobody else is left to remove the folder of the sockets when the parent was killed."""
    while os.read(0, 1024):  # not by sys.stdin, whose lock the interpreter wants when it ends
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    os._exit(main())  # nothing is left to put away, and the interpreter would take seconds to look for it
