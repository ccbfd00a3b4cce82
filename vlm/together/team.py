"""The process that is asked, and its hold on those that follow it.

Knows processes, pipes, and who must hear of what before it is computed. Knows nothing of which layers are cut
(`vlm.tensor_parallel`), of HTTP, or of what an engine decides.
"""

from __future__ import annotations

import json
import pickle
import socket
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import wraps
from pathlib import Path
from threading import RLock, Thread
from typing import Any

import torch
from torch import distributed as dist

from vlm.api import VLM
from vlm.errors import RunError, UsageError
from vlm.explain import Explanation
from vlm.generation.engine import Engine
from vlm.generation.lockstep import LeadingEngine
from vlm.model import VLMModel
from vlm.processing import VLMProcessor
from vlm.saving import config_of
from vlm.tensor_parallel import check

from .part import Call, Make, Part, Take, Told

GRACE = 10.0  # seconds that a process which has been told to end may take
AGAIN = "start them again"
MOMENT = 5.0  # seconds in which the death is noticed of which a collective call has failed


def load_together(
    path: str | Path, processes: int, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> TogetherVLM:
    """Load a model folder or a hub id into so many processes, this one among them: for a model that no single GPU takes.

    Each reads its own part of the file and no more, of the language model and the adapters an even share. device, dtype: as of
    `vlm.load`; a device with an index is the first of neighbouring GPUs. On CPUs each process keeps to its share of the
    cores, this one too. The others end with this process, or by `team.end()`; a process can hold one such model at a
    time. Raises UsageError for a model that cannot be cut so (`vlm.tensor_parallel.check`) and for devices that
    are not there, RunError where a process fails.
    """
    if processes < 2:
        raise UsageError(f"tensor_parallel is {processes}; it must be at least 2, or use vlm.load")
    check(config_of(path), processes)
    first = _first_gpu(str(device), processes)
    if dist.is_initialized():
        raise UsageError(
            "this process is in a process group already and can not hold a model with others; use a new one"
        )
    team = Team(processes)
    try:
        return TogetherVLM(*team.join(Part(str(path), dtype, processes, first, rank=0, port=team.port)), team)
    except BaseException:
        team.end()
        raise


def _first_gpu(device: str, processes: int) -> int | None:
    """The index of the first process's GPU, None for CPUs. Raises UsageError for too few."""
    gpus = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and not gpus):
        if gpus:
            raise UsageError(
                f"device is cpu, tensor_parallel is {processes}, and there are {gpus} GPUs, which transformers would cut for; "
                "hide them with CUDA_VISIBLE_DEVICES="
            )
        return None
    first = int(device.removeprefix("cuda").removeprefix(":") or 0) if device != "auto" else 0
    if first + processes > gpus:
        raise UsageError(
            f"tensor_parallel {processes} from GPU {first} on takes {first + processes} GPUs and {gpus} are there; lower it"
        )
    return first


class Team:
    """The processes that follow this one. port: where they meet. lost: what became of one that died, None while all live."""

    def __init__(self, processes: int) -> None:
        self.lost: str | None = None
        self._lock = RLock()  # held from the telling to the end of the deed: all do everything in one order
        self._told = False  # whether the others know what is being done
        self._dropped: deque[int] = deque()
        self._engines = 0
        self._listening = socket.create_server(("127.0.0.1", 0))  # where this machine alone can reach it
        self.port: int = self._listening.getsockname()[1]
        self._others: list[subprocess.Popen[bytes]] = []
        self.end = weakref.finalize(self, _end, self._others)
        command = (sys.executable, "-P", "-m", "vlm.together.follower")
        for _ in range(1, processes):
            # A session: Ctrl-C reaches this process alone.
            pipe = subprocess.PIPE
            self._others.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True))

    def join(self, part: Part) -> tuple[VLMModel, VLMProcessor]:
        """Read this process's part, and return when the others have theirs. Raises UsageError, and RunError for theirs."""
        for rank, other in enumerate(self._others, start=1):
            with suppress(BrokenPipeError):  # what became of it is told next
                _send(other, pickle.dumps(replace(part, rank=rank)))
        self._hear(part.processes)  # that they are there: who waits for one that died before would wait for long
        try:
            read = part.read(self._store(part.processes))
        except RuntimeError as error:
            self._hear(part.processes)  # what is behind it
            raise RunError(f"the processes cannot work together: {error}") from error
        self._hear(part.processes)
        for rank, other in enumerate(self._others, start=1):
            Thread(target=_watch, args=(weakref.ref(self), rank, part.processes, other), daemon=True).start()
        return read

    def _hear(self, processes: int) -> None:
        """Wait for an answer of each. Raises RunError for what hindered one, and for one that has died."""
        for rank, other in enumerate(self._others, start=1):
            assert other.stdout is not None
            line = other.stdout.readline()
            if not line:
                raise RunError(_ended(rank, processes, other.wait()))
            if error := json.loads(line)["error"]:
                raise RunError(f"process {rank} of {processes}: {error}")

    def _store(self, processes: int) -> dist.Store:
        listening = self._listening.detach()
        return dist.TCPStore(
            "127.0.0.1", self.port, processes, is_master=True, wait_for_workers=False, master_listen_fd=listening
        )

    @contextmanager
    def turn(self, deed: Make | Take | Call) -> Iterator[None]:
        """Tell the others what all do in a block. Raises RunError where one of them has died."""
        with self._lock:
            dropped = tuple(self._dropped.popleft() for _ in range(len(self._dropped)))
            content = pickle.dumps(Told(deed, dropped))
            if self.lost is not None:
                raise RunError(self.lost)
            try:
                for other in self._others:
                    _send(other, content)
                self._told = True
                yield
            except UsageError:  # which the others raise too
                raise
            except BaseException as error:
                self._await_death(MOMENT if isinstance(error, (RuntimeError, BrokenPipeError)) else 0.0)
                # Whatever the others are at now, they are at it alone.
                self.lost = self.lost or f"the processes that hold the model are out of step after: {error}; {AGAIN}"
                if isinstance(error, Exception):
                    raise RunError(self.lost) from error
                raise
            finally:
                self._told = False

    def guard(self, model: VLMModel) -> None:
        """Let the model refuse (UsageError) what the others do not do too: it would wait for them."""
        for module in (model, model.language_model, model.language_model.base_model):
            module.register_forward_pre_hook(self._refuse_alone)

    def _refuse_alone(self, *_: Any) -> None:
        if not self._told:
            raise UsageError(
                "other processes hold this model too and hear of VLM's methods alone; call one of these, not the model"
            )

    def _await_death(self, seconds: float) -> None:
        """Return when one has died, or so many seconds later."""
        end = time.monotonic() + seconds
        while self.lost is None and time.monotonic() < end:
            time.sleep(0.01)

    def number_of(self, engine: Engine) -> int:
        """What a new engine is called. When nobody uses it any more, those that follow it are let go of too."""
        number, self._engines = self._engines, self._engines + 1
        weakref.finalize(engine, self._dropped.append, number)
        return number


def _send(other: subprocess.Popen[bytes], content: bytes) -> None:
    assert other.stdin is not None
    other.stdin.write(content)
    other.stdin.flush()


def _watch(team: weakref.ref[Team], rank: int, processes: int, other: subprocess.Popen[bytes]) -> None:
    code = other.wait()
    if (living := team()) is not None:
        living.lost = living.lost or _ended(rank, processes, code)


def _ended(rank: int, processes: int, code: int) -> str:
    return f"process {rank} of the {processes} that hold the model ended with {code}; {AGAIN}"


def _end(others: list[subprocess.Popen[bytes]]) -> None:
    whole = all(other.poll() is None for other in others)
    for other in others:
        assert other.stdin is not None
        with suppress(BrokenPipeError):
            other.stdin.close()  # which tells it to end
    for other in others:
        try:
            other.wait(GRACE)
        except subprocess.TimeoutExpired:
            other.kill()
            other.wait()
    # On GPUs a group that waits for somebody dead does not let go.
    if dist.is_initialized() and (whole or dist.get_backend() == "gloo"):
        dist.destroy_process_group()


def _shared(name: str) -> Callable[..., Any]:
    """The method of `VLM` of that name, called in all processes."""
    method = getattr(VLM, name)

    @wraps(method)
    def call(self: TogetherVLM, *arguments: Any, **options: Any) -> Any:
        with self.team.turn(Call(name, arguments, options)):
            return method(self, *arguments, **options)

    return call


class TogetherVLM(VLM):
    """A `VLM` whose model other processes hold with this one. It is asked as any other is."""

    def __init__(self, model: VLMModel, processor: VLMProcessor, team: Team) -> None:
        super().__init__(model, processor)
        self.team = team
        team.guard(model)

    @property
    def lost(self) -> str | None:
        """As of `VLM`."""
        return self.team.lost

    def engine(self, rows: int, length: int | None = None, **options: Any) -> Engine:
        """As of `VLM`; its steps are taken in all processes."""
        team, tokenizer, ends = self.team, self.processor.tokenizer, self.processor.end_token_ids
        options |= {"rows": rows, "length": length}
        engine = LeadingEngine(self.model, tokenizer, ends, turn=lambda step: team.turn(Take(number, step)), **options)
        number = team.number_of(engine)
        with team.turn(Make(number, options)):
            return engine

    def explain(self, image: Any, question: str, **options: Any) -> Explanation:
        """Raises UsageError: each process sees the attention of its own heads alone."""
        raise UsageError("explain looks into the layers, which several processes hold; use vlm.load")

    fill_mask, match = _shared("fill_mask"), _shared("match")
    loglikelihood, loglikelihood_rolling = _shared("loglikelihood"), _shared("loglikelihood_rolling")
    embed_image, embed_text = _shared("embed_image"), _shared("embed_text")
