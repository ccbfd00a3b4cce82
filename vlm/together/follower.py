"""A process that holds a part of a model and does what the first one does: `python -m vlm.together.follower`.

Knows its part, its engines and its standard input, from which it reads its `Part` and then one `Told` after the other,
pickled. It answers twice on standard output, when it is there and when it has its part: `{"error": null}`, or what hindered
it. When standard input ends, so does it.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import Any

from torch import distributed as dist

from vlm.api import VLM
from vlm.errors import RunError, UsageError
from vlm.generation.lockstep import Follower

from .part import Call, Make, Part, Take


def main() -> int:
    """Follow until standard input ends; the exit code where something else comes first."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    heard: SimpleQueue[Any] = SimpleQueue()
    Thread(target=_hear, args=(heard,), daemon=True).start()
    part: Part = heard.get()
    print(json.dumps({"error": None}), file=told, flush=True)
    try:
        store = dist.TCPStore("127.0.0.1", part.port, part.processes, is_master=False)
        vlm = VLM(*part.read(store))
    except (UsageError, RunError) as error:
        print(json.dumps({"error": str(error)}), file=told, flush=True)
        return 1
    print(json.dumps({"error": None}), file=told, flush=True)
    try:
        _follow(vlm, heard)
    except (RunError, RuntimeError) as error:
        print(f"process {part.rank} of {part.processes}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return 1


def _hear(heard: SimpleQueue[Any]) -> None:
    """When the first process has ended nothing is left to do, not even the step that is under way."""
    with suppress(EOFError, pickle.UnpicklingError):
        while True:
            heard.put(pickle.load(sys.stdin.buffer))
    os._exit(0)


def _follow(vlm: VLM, heard: SimpleQueue[Any]) -> None:
    engines: dict[int, Follower] = {}
    while True:
        told = heard.get()
        for number in told.dropped:
            engines.pop(number, None)
        with suppress(UsageError):  # the first one raises it too, to who asked
            _do(told.deed, vlm, engines)


def _do(deed: Make | Take | Call, vlm: VLM, engines: dict[int, Follower]) -> None:
    if isinstance(deed, Make):
        engines[deed.number] = Follower(vlm.engine(**deed.options))
    elif isinstance(deed, Take):
        engines[deed.number].step(deed.step)
    else:
        getattr(vlm, deed.name)(*deed.arguments, **deed.options)


if __name__ == "__main__":
    os._exit(main())  # the thread that hears holds standard input, which the interpreter wants when it ends
