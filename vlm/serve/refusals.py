"""A request that is not answered, in OpenAI's error form. Knows statuses and JSON; nothing of why."""

from __future__ import annotations

import json
import logging
import traceback
from typing import Any

log = logging.getLogger("vlm.serve")
LONGEST = 500  # characters of a message: it may quote a name that a client made up


class Refusal(Exception):
    """What a client is told instead of an answer.

    status: the HTTP status. param: the field that is to blame, as `messages.0.content`. code: OpenAI's name of the
    fault. retry_after: seconds after which it may go better.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    def content(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        kind = "invalid_request_error"
        if self.status >= 500:
            kind = "server_error"
        elif self.status == 429:
            kind = "rate_limit_error"
        shown = self.message if len(self.message) <= LONGEST else self.message[: LONGEST - 1] + "…"
        return {"error": {"message": shown, "type": kind, "param": self.param, "code": self.code}}

    def body(self) -> bytes:
        """`content` as JSON in ASCII, whatever it quotes."""
        return json.dumps(self.content()).encode("ascii")

    def headers(self) -> dict[str, str]:
        """What goes with `body`."""
        headers = {"content-type": "application/json"}
        if self.retry_after:
            headers["retry-after"] = str(self.retry_after)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def internal_error() -> Refusal:
    """What is told of a fault that is ours."""
    return Refusal(500, "the server failed at this request; its log says at what", code="internal_error")


def shutting_down() -> Refusal:
    """What is told of what comes after the end has begun."""
    return Refusal(503, "the server is shutting down; ask another", code="shutting_down", retry_after=1)


def log_failure(error: BaseException) -> None:
    """Log where a fault arose and of what kind it is. Its message is left out: it may quote what a client sent."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("a request failed with %s\n%s", type(error).__name__, frames)
