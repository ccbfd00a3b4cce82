"""Waiting for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

LIMIT = 120  # seconds; a busy machine is slow, and nothing worse


def eventually(true: Callable[[], Any]) -> None:
    """Fails where it does not become true."""
    end = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)
