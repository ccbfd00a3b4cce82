"""A service on a port, until a signal ends it. Knows sockets, signals and uvicorn; nothing of what is served.

The first signal ends it gently: what has been asked is answered, what is new gets 503, and the exit code is 0. The second
ends it at once. When what is served is dead it ends by itself, with exit code 1, so that who watches it starts it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Iterator

import uvicorn

from vlm.errors import RunError, UsageError

from .app import Answering, Service, make_app

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Server(uvicorn.Server):
    """uvicorn around one service."""

    def __init__(self, service: Answering, api_key: str | None = None) -> None:
        # No line for each request: the metrics count them, and a log that has no request in it has no picture in it.
        app = make_app(service, api_key)
        super().__init__(uvicorn.Config(app, http="h11", ws="none", log_level="warning", access_log=False))
        self._service = service
        self._ending: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In place of uvicorn's, which closes the port first and tells by a signal that it was ended by one."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._end, number)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    def _end(self, number: int) -> None:
        if self._ending is not None:
            os._exit(128 + number)
        self._ending = asyncio.ensure_future(self.end())

    async def end(self) -> None:
        """Answer what was asked, then stop."""
        await self._service.drain()
        self.should_exit = True


class Mortal(Server):
    """Ends by itself when what it serves is dead, and who waits for it has been told."""

    def __init__(self, service: Service, api_key: str | None = None) -> None:
        super().__init__(service, api_key)
        self._mortal = service

    async def on_tick(self, counter: int) -> bool:
        """What uvicorn does ten times a second; whether to end."""
        dead = self._mortal.health()["status"] == "dead"
        if dead:
            self._mortal.give_up()
        return await super().on_tick(counter) or dead


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises UsageError where that is not possible."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UsageError(f"{host}:{port}: can not be listened on ({error.strerror or error}); choose another") from None


def tell_address(name: str, host: str, listening: socket.socket) -> None:
    """Print where what can be reached."""
    place = f"[{host}]" if ":" in host else host
    print(f"serving {name} at http://{place}:{listening.getsockname()[1]}/v1", flush=True)


def serve(service: Service, host: str, port: int, api_key: str | None = None) -> None:
    """Serve until a signal comes. Raises UsageError for a port that is taken, RunError where the server did not start, where
    the engine has failed, and where a process that holds the model with this one has died."""
    with bind(host, port) as listening:
        server = Mortal(service, api_key)
        tell_address(service.name, host, listening)
        server.run(sockets=[listening])
        if not server.started:
            raise RunError("the server did not start; see above")
        if service.lost is not None:
            raise RunError(service.lost)
        if service.health()["status"] == "dead":
            raise RunError("the decoding engine has failed; start the server again")
