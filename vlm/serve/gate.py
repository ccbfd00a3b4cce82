"""What is judged of a request before any of it is kept: its key, its type, its size, and how long it takes to come.

Knows ASGI messages. Knows nothing of what a body says. Every request passes here, and is counted on its way out.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable
from typing import Any

from .metrics import Metrics
from .refusals import Refusal, internal_error, log_failure

Scope = dict[str, Any]
SLOWEST = 60.0  # seconds that a body may take to come
BODIES = 8  # of the largest size, that all requests together may hold
LINGER = 2.0  # seconds in which a client may still send what nobody reads, so that it gets to reading the answer
OPEN = ("/health", "/metrics")


class Gate:
    """ASGI middleware. body_bytes: largest body. api_key: what /v1 asks for as `Authorization: Bearer`, None for nothing."""

    def __init__(
        self, app: Any, *, metrics: Metrics, body_bytes: int, api_key: str | None, routes: frozenset[str]
    ) -> None:
        self._app, self._metrics, self._limit, self._routes = app, metrics, body_bytes, routes
        self._key = None if api_key is None else api_key.encode()
        self._held = 0

    async def __call__(self, scope: Scope, receive: Callable, send: Callable) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        body = bytearray()
        try:
            self._check(scope)
            await self._read(scope, receive, body)
            await self._app(scope, _once(bytes(body), receive), answer.send)
        except Refusal as refusal:
            await _refuse(refusal, answer, receive)
        except Exception as error:
            log_failure(error)
            await _refuse(internal_error(), answer)
        finally:
            self._held -= len(body)
            route = scope["path"] if scope["path"] in self._routes else "other"
            self._metrics.requests.labels(route, answer.status or 499).inc()

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if self._key is not None and scope["path"] not in OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self._key):
                raise Refusal(
                    401, "the API key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key"
                )
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if scope["method"] == "POST" and kind != b"application/json":
            raise Refusal(415, "the body is not declared as JSON; send Content-Type: application/json")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._limit:
            raise self._too_large(f"{int(length)} bytes")

    async def _read(self, scope: Scope, receive: Callable, body: bytearray) -> None:
        """Append what comes to `body`."""
        try:
            async with asyncio.timeout(SLOWEST):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refusal(499, "the client hung up")
                    piece = message.get("body", b"")
                    if len(body) + len(piece) > self._limit:
                        raise self._too_large(f"more than {self._limit} bytes")
                    if self._held + len(piece) > BODIES * self._limit:
                        told = "the server is receiving as much as it can; try again"
                        raise Refusal(503, told, code="overloaded", retry_after=1)
                    self._held += len(piece)
                    body += piece
                    more = message.get("more_body", False)
        except TimeoutError:
            raise Refusal(408, f"the body did not come within {SLOWEST:g} s; send it faster") from None

    def _too_large(self, size: str) -> Refusal:
        return Refusal(413, f"the body has {size}, the limit is {self._limit}; make it smaller", code="body_too_large")


class _Answer:
    """Sends, and remembers with which status."""

    def __init__(self, send: Callable) -> None:
        self._send = send
        self.status: int | None = None

    async def send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)


def _once(body: bytes, receive: Callable) -> Callable:
    """The body as one message, then whatever else comes: that the client hangs up."""
    bodies = [{"type": "http.request", "body": body, "more_body": False}]

    async def told() -> Any:
        return bodies.pop() if bodies else await receive()

    return told


async def _refuse(refusal: Refusal, answer: _Answer, receive: Callable | None = None) -> None:
    """Tell why, and drop what still comes by `receive` if it is given."""
    if answer.status is not None or refusal.status == 499:
        return
    headers = {**refusal.headers(), "content-length": str(len(refusal.body())), "connection": "close"}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await answer.send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await answer.send({"type": "http.response.body", "body": refusal.body(), "more_body": True})
    if receive is not None:
        await _let_go(receive)
    await answer.send({"type": "http.response.body", "body": b""})


async def _let_go(receive: Callable) -> None:
    """Drop what still comes of a body. A connection that is closed on a sender takes the answer with it."""
    try:
        async with asyncio.timeout(LINGER):
            message = {"more_body": True}
            while message.get("more_body", False):
                message = await receive()
    except TimeoutError:
        pass
