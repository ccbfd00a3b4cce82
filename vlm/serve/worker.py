"""The one thread that owns the decoding engine, and the replies that the event loop waits for.

Knows the engine's surface, places in a queue and deadlines. Knows nothing of HTTP's requests, pictures or JSON. A reply
takes its place before its pictures are opened, so that what waits is bounded whatever it is. The engine is given no more
than it has rows for: who waits does so here, where a deadline ends it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from threading import Condition, Thread
from typing import Any

from vlm.errors import RunError, UsageError
from vlm.generation.decoding import Decoding
from vlm.generation.engine import Engine
from vlm.generation.request import Generation, Prompt

from .limits import Limits
from .metrics import Metrics
from .refusals import Refusal, internal_error, log_failure, shutting_down

log = logging.getLogger("vlm.serve")
Job = tuple[Prompt, Decoding]
GRACE = 5.0  # seconds that a dead engine's thread may take to end


@dataclass(frozen=True)
class Progress:
    """What a reply has come to: text added, new tokens so far, prompt tokens reused, and why it ended if it did."""

    text: str
    tokens: int
    reused: int
    finish_reason: str | None


class Place:
    """One place in the queue, and what is done in it: a reply, or a piece of other work with the model."""

    def __init__(self, index: int, events: asyncio.Queue[tuple[int, Any]]) -> None:
        self.index, self._events = index, events
        self.opened = time.monotonic()
        self.job: Job | None = None
        self.work: Callable[[], Any] | None = None
        self.generation: Generation | None = None  # the thread's own, as what follows
        self.first_token: float | None = None

    def put(self, event: Any) -> None:
        """Told by the worker, on the event loop: Progress, what the work returned, or a Refusal."""
        self._events.put_nowait((self.index, event))


class Places:
    """The places of one request. Lives on the event loop; made by `Worker.open`, and `close` gives them back."""

    def __init__(self, worker: Worker, count: int) -> None:
        self._worker = worker
        self._events: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self.each = [Place(index, self._events) for index in range(count)]

    def start(self, jobs: Sequence[Job]) -> None:
        """Let a reply to each job wait for a row; `progress` tells of them."""
        for place, job in zip(self.each, jobs, strict=True):
            place.job = job
            self._worker.enqueue(place)

    async def progress(self) -> AsyncIterator[tuple[int, Progress]]:
        """Which reply has come to what, whenever one has, until all have ended. Raises Refusal."""
        left = len(self.each)
        while left:
            index, told = await self._next()
            left -= told.finish_reason is not None
            yield index, told

    async def run(self, work: Callable[[], Any]) -> Any:
        """Do `work` in the engine's thread, between two steps, for the model is nobody else's. Raises Refusal."""
        (place,) = self.each
        place.work, place.opened = work, time.monotonic()
        self._worker.enqueue(place)
        return (await self._next())[1]

    async def _next(self) -> tuple[int, Any]:
        index, event = await self._events.get()
        if isinstance(event, Refusal):
            raise event
        return index, event

    def close(self) -> None:
        """Free every place, and the rows of what is not done. May be called again."""
        for place in self.each:
            self._worker.close(place)


class Worker:
    """Owns an engine. Public methods are called on one event loop, `start` first; none blocks it."""

    def __init__(self, engine: Engine, limits: Limits, metrics: Metrics) -> None:
        self._engine, self._limits, self._metrics = engine, limits, metrics
        self._thread = Thread(target=self._run, name="vlm-engine", daemon=True)
        self._places: set[Place] = set()  # touched on the event loop alone
        self._changed = Condition()  # guards the following three
        self._waiting: list[Place] = []
        self._closed: list[Place] = []
        self._stopping = False
        self._active: dict[int, Place] = {}  # by generation; touched in the thread alone, as the next
        self._told: list[tuple[Place, Any]] = []
        self.draining = False
        self.dead = False

    def start(self) -> None:
        """Begin to work."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def open(self, count: int) -> Places:
        """So many places. Raises Refusal: 500 for a dead engine, 503 at the end, 429 when there is no room."""
        if self.dead:
            raise _dead()
        if self.draining:
            raise shutting_down()
        room = self._limits.rows + self._limits.queue - len(self._places)
        if count > room:
            told = f"{count} replies are asked for and there is room for {room}; try again"
            raise Refusal(429, told, code="queue_full", retry_after=1)
        places = Places(self, count)
        self._places.update(places.each)
        return places

    def enqueue(self, place: Place) -> None:
        """Let it wait for its turn."""
        if self.dead:
            place.put(_dead())
            return
        with self._changed:
            self._waiting.append(place)
            self._changed.notify()

    def close(self, place: Place) -> None:
        """Forget it, whatever it has come to."""
        if place not in self._places:
            return
        self._places.remove(place)
        with self._changed:
            if place in self._waiting:
                self._waiting.remove(place)
            else:
                self._closed.append(place)
            self._changed.notify()

    async def drain(self) -> None:
        """Take nothing new, and return when all that was taken is answered."""
        self.draining = True
        while self._places:
            await asyncio.sleep(0.02)

    def stop(self) -> None:
        """End the thread after its round; one that waits for a process that has died is left to itself."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(GRACE if self.dead else None)

    def give_up(self) -> None:
        """Take it for dead, whatever its thread is at."""
        self.dead = True
        self._bury()

    def _bury(self) -> None:
        for place in self._places:
            place.put(_dead())

    # In the thread

    def _run(self) -> None:
        try:
            while self._round():
                pass
        except RunError:  # told by who knows what was lost
            self.dead = True
            self._loop.call_soon_threadsafe(self._bury)
        except BaseException:
            # A row may be in any state now, so nothing of this engine can be trusted further.
            log.exception("the decoding engine failed")
            self.dead = True
            self._loop.call_soon_threadsafe(self._bury)

    def _round(self) -> bool:
        with self._changed:
            while not (self._waiting or self._closed or self._active or self._stopping):
                self._changed.wait()
            if self._stopping:
                return False
            closed, self._closed = self._closed, []
        for place in closed:
            if place.generation is not None and self._active.pop(id(place.generation), None) is not None:
                self._engine.cancel(place.generation)
                self._count(place)
        for place in self._next_ones():
            if place.work is None:
                self._add(place)
            else:
                self._told.append((place, _outcome(place.work)))
        if self._active:
            for generation in self._engine.step():
                self._hear(generation)
        self._publish()
        return True

    def _next_ones(self) -> list[Place]:
        """Who has waited too long is told so; the first in the line get the free rows, and one other work is done a round."""
        now, free = time.monotonic(), self._limits.rows - len(self._active)
        with self._changed:
            late = [place for place in self._waiting if now - place.opened > self._limits.wait]
            in_time = [place for place in self._waiting if place not in late]
            chosen = [place for place in in_time if place.work is None][:free]
            chosen += [place for place in in_time if place.work is not None][:1]
            self._waiting = [place for place in in_time if place not in chosen]
        told = f"no row was free within {self._limits.wait:g} s; try again"
        self._told += [(place, Refusal(503, told, code="queue_timeout", retry_after=1)) for place in late]
        return chosen

    def _add(self, place: Place) -> None:
        assert place.job is not None, "it waited for a row"
        try:
            place.generation = self._engine.add(*place.job)
        except UsageError as error:
            self._told.append((place, Refusal(400, str(error))))
            return
        self._active[id(place.generation)] = place

    def _hear(self, generation: Generation) -> None:
        place = self._active.get(id(generation))
        if place is None:
            return
        if place.first_token is None and generation.tokens:
            place.first_token = time.monotonic()
            self._metrics.first_token.observe(place.first_token - place.opened)
        if generation.finish_reason is not None:
            del self._active[id(generation)]
            self._count(place)
        told = Progress(generation.take(), len(generation.tokens), generation.reused, generation.finish_reason)
        self._told.append((place, told))

    def _count(self, place: Place) -> None:
        generation = place.generation
        assert generation is not None
        tokens = self._metrics.tokens
        tokens.labels("prompt").inc(len(generation.prompt.ids))
        tokens.labels("reused").inc(generation.reused)
        tokens.labels("new").inc(len(generation.tokens))
        if place.first_token is not None and len(generation.tokens) > 1:
            taken = time.monotonic() - place.first_token
            self._metrics.per_token.observe(taken / (len(generation.tokens) - 1))

    def _publish(self) -> None:
        """Tell the event loop all at once: waking it costs more than what it is told."""
        self._metrics.running.set(len(self._active))
        self._metrics.waiting.set(len(self._waiting))
        self._metrics.cache_bytes.set(self._engine.cache_bytes)
        told, self._told = self._told, []
        if told:
            self._loop.call_soon_threadsafe(_deliver, told)


def _outcome(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except UsageError as error:
        return Refusal(400, str(error))
    except Exception as error:
        log_failure(error)
        return internal_error()


def _deliver(told: list[tuple[Place, Any]]) -> None:
    for place, event in told:
        place.put(event)


def _dead() -> Refusal:
    return Refusal(500, "the decoding engine has failed; start the server again", code="engine_dead")
