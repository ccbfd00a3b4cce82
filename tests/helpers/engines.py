"""Engines run to their end."""

from __future__ import annotations

from vlm.generation.engine import Engine


def finish(engine: Engine) -> None:
    """Step until nobody is left."""
    while engine.busy:
        engine.step()
