"""Several servers with the same model behind one address: who is asked, who has died, and what the client is told of it.

Knows processes, Unix sockets and how much each replica has to do. Knows nothing of what is asked: limits of a body and keys
are judged by the gate in front, everything else by the replica. A request goes to the replica with the least in flight. One
that is full is passed over; one that dies is started again, and what it was doing is lost, since a request that kills a
replica must not be given to the next.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
from fastapi.responses import Response

from vlm.errors import RunError, UsageError
from vlm.processes import Share

from .app import CHAT, COMPLETIONS, EMBEDDINGS, Stream
from .metrics import Merged, Metrics
from .refusals import Refusal, shutting_down
from .replica import Settings
from .replies import event
from .server import Server, bind, tell_address

log = logging.getLogger("vlm.serve")
ATTEMPTS = 5  # in a row at a replica that does not live
STEADY = 60.0  # seconds that a replica has lived when an earlier death counts no more
GRACE = 10.0  # seconds that a replica with nothing to do may take to end
MEASURED = 2.0  # seconds that its metrics are waited for
PASSED_ON = ("content-type", "retry-after")


class Replica:
    """One process, and what it has to do. in_flight: requests. turn: when it was last asked, for choosing among equals."""

    def __init__(self, settings: Settings, folder: Path, share: Share) -> None:
        self._settings, self._share, self._path = settings, share, folder / str(share.process)
        self._process: asyncio.subprocess.Process | None = None
        # A connection for each request: one that is kept may be closed by the replica just when it is used again.
        connector = aiohttp.UnixConnector(str(self._path), force_close=True, limit=0)
        self.session = aiohttp.ClientSession("http://replica", connector=connector, timeout=aiohttp.ClientTimeout())
        self.number, self.alive, self.in_flight, self.turn = share.process, False, 0, 0

    async def start(self) -> None:
        """Begin, and return when it can be asked. Raises UsageError for what it can not serve, RunError where it died."""
        # -P: a file in the working directory is not taken for a module. A session: Ctrl-C reaches the parent alone.
        command = (sys.executable, "-P", "-m", "vlm.serve.replica")
        pipe = asyncio.subprocess.PIPE
        self._process = process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, start_new_session=True
        )
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(self._settings.line(self._path, self._share))
        line = await process.stdout.readline()
        if not line:
            raise RunError(
                f"replica {self.number} ended with {await process.wait()} before it could be asked; see above"
            )
        if error := json.loads(line)["error"]:
            await process.wait()
            raise UsageError(error)
        self.alive = True

    async def death(self) -> int:
        """Wait for it; its exit code."""
        assert self._process is not None
        code = await self._process.wait()
        self.alive = False
        return code

    async def end(self) -> None:
        """End it if it lives, gently at first."""
        await self.session.close()
        if self._process is None or self._process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), GRACE)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    @contextmanager
    def asked(self, turn: int) -> Iterator[None]:
        """Count a request for the time of a block."""
        self.in_flight, self.turn = self.in_flight + 1, turn
        try:
            yield
        finally:
            self.in_flight -= 1


class Replicas:
    """All of them: `Answering`, as one model does. Lives on one event loop."""

    def __init__(self, settings: Settings, folder: Path, count: int) -> None:
        self.name, self.limits = settings.name, settings.limits
        self.created, self.metrics = int(time.time()), Metrics()
        self._all = [Replica(settings, folder, Share(number, count)) for number in range(count)]
        self._draining, self._given_up, self._turn = False, 0, 0

    async def start(self) -> None:
        """Begin, and return when each can be asked. Raises the first failure."""
        await asyncio.gather(*(replica.start() for replica in self._all))

    async def end(self) -> None:
        """End every process."""
        await asyncio.gather(*(replica.end() for replica in self._all))

    async def chat(self, body: bytes) -> Response:
        """Answer /v1/chat/completions. Raises Refusal, as the next two."""
        return await self._answer(CHAT, body)

    async def complete(self, body: bytes) -> Response:
        """Answer /v1/completions."""
        return await self._answer(COMPLETIONS, body)

    async def embed(self, body: bytes) -> Response:
        """Answer /v1/embeddings."""
        return await self._answer(EMBEDDINGS, body)

    async def _answer(self, path: str, body: bytes) -> Response:
        if self._draining:
            raise shutting_down()
        full = None
        for replica in sorted(self._living(), key=lambda one: (one.in_flight, one.turn)):
            self._turn += 1
            answer = await _ask(replica, self._turn, path, body)
            if answer is not None and answer.status_code != 429:
                return answer
            full = answer or full
        if full is None:
            told = "no replica lives; " + (
                "start the server again" if self._given_up == len(self._all) else "try again"
            )
            raise Refusal(503, told, code="no_replica", retry_after=1)
        return full

    def _living(self) -> list[Replica]:
        return [replica for replica in self._all if replica.alive]

    def health(self) -> dict[str, Any]:
        """Well while one replica lives."""
        alive = len(self._living())
        state = "draining" if self._draining else "ok" if alive else "dead"
        return {"status": state, "replicas": len(self._all), "alive": alive}

    async def measured(self) -> bytes:
        """What each tells by its number, and the requests that came here."""
        living = self._living()
        told = await asyncio.gather(*(_measured(replica) for replica in living))
        texts = {replica.number: text for replica, text in zip(living, told, strict=True) if text is not None}
        return Merged(self.metrics, texts).text()

    @asynccontextmanager
    async def life(self) -> AsyncIterator[None]:
        """Who dies is started again."""
        watching = [asyncio.ensure_future(self._watch(replica)) for replica in self._all]
        yield
        for task in watching:
            task.cancel()
        await asyncio.wait(watching)

    async def _watch(self, replica: Replica) -> None:
        failures = 0
        while failures < ATTEMPTS:
            begun = time.monotonic()
            code = await replica.death()
            failures = failures + 1 if time.monotonic() - begun < STEADY else 1
            log.error("replica %d ended with %d and is started again", replica.number, code)
            await asyncio.sleep(failures - 1)
            try:
                await replica.start()
            except (UsageError, RunError) as error:
                log.error("%s", error)
        self._given_up += 1
        log.error("replica %d has failed %d times and is given up", replica.number, ATTEMPTS)

    async def drain(self) -> None:
        """Take nothing new, and return when all that was taken is answered."""
        self._draining = True
        while any(replica.in_flight for replica in self._all):
            await asyncio.sleep(0.02)


async def _ask(replica: Replica, turn: int, path: str, body: bytes) -> Response | None:
    """What it answers; None where it could not be reached. Raises Refusal where it died of it."""
    with ExitStack() as held:
        held.enter_context(replica.asked(turn))
        try:
            reply = await replica.session.post(path, data=body, headers={"content-type": "application/json"})
            held.callback(reply.close)
            if reply.content_type == "text/event-stream":
                return Stream(_events(reply), held.pop_all().close)
            content = await reply.read()
        except aiohttp.ClientConnectorError:
            return None
        except aiohttp.ClientError:
            raise _lost() from None
        headers = {name: reply.headers[name] for name in PASSED_ON if name in reply.headers}
        return Response(content, reply.status, headers)


async def _events(reply: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Whole events as they come; after a replica's death one that tells it."""
    begun = b""
    try:
        async for piece in reply.content.iter_any():
            whole, end, begun = (begun + piece).rpartition(b"\n\n")
            if whole:
                yield whole + end
    except aiohttp.ClientError:
        yield event(_lost().content())


def _lost() -> Refusal:
    return Refusal(502, "the replica that worked on it has died; ask again", code="replica_lost", retry_after=1)


async def _measured(replica: Replica) -> str | None:
    try:
        async with replica.session.get("/metrics", timeout=aiohttp.ClientTimeout(MEASURED)) as reply:
            return await reply.text()
    except (aiohttp.ClientError, TimeoutError):
        return None


def serve_replicas(count: int, settings: Settings, host: str, port: int, api_key: str | None = None) -> None:
    """Serve until a signal comes. Raises UsageError for a port that is taken and a model that can not be served."""
    with bind(host, port) as listening, TemporaryDirectory(prefix="vlm-serve-", ignore_cleanup_errors=True) as folder:
        asyncio.run(_serve(count, settings, Path(folder), host, listening, api_key))


async def _serve(
    count: int, settings: Settings, folder: Path, host: str, listening: socket.socket, api_key: str | None
) -> None:
    replicas = Replicas(settings, folder, count)
    try:
        await replicas.start()
        server = Server(replicas, api_key)
        tell_address(replicas.name, host, listening)
        await server.serve(sockets=[listening])
    finally:
        await replicas.end()
    if not server.started:
        raise RunError("the server did not start; see above")
