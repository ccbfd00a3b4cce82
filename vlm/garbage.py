"""Python's garbage collector, kept from looking again and again through what is no garbage: modules, millions of entries.

Knows the collector. Knows nothing of what is made meanwhile.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage meanwhile; afterwards as before."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            if not gc.get_freeze_count():  # else who froze it would find it thawed
                # All that is there is old at once; else the next allocation would look through it as new.
                gc.freeze()
                gc.unfreeze()
            gc.enable()
