"""What one request may cost. Knows numbers; nothing of who holds them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from vlm.errors import UsageError


@dataclass(frozen=True)
class Limits:
    """Every bound of a server that the model itself does not set.

    rows: replies decoded together. queue: replies that may wait beyond these. wait: seconds that one may wait.
    body_bytes: of a request. images: pictures in a request. pixels: of one picture. choices: replies that one request may
    ask for. inputs: texts in a request for embeddings.
    """

    rows: int = 16
    queue: int = 64
    wait: float = 60.0
    body_bytes: int = 32 * 2**20
    images: int = 8
    pixels: int = 16_000_000
    choices: int = 8
    inputs: int = 256

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name in ("queue", "images") else 1
            if field.name == "wait" and value > 0:
                continue
            if value < least:
                raise UsageError(
                    f"{field.name} is {value}; it must be {'above 0' if field.name == 'wait' else f'at least {least}'}"
                )
