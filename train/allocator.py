"""What becomes of memory that a training step frees: it is kept for the next.

Knows glibc's malloc. Knows nothing of steps.
"""

from __future__ import annotations

import ctypes
import platform

# Of malloc.h; it names no greater threshold than this, and takes larger blocks from the system one by one.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_THRESHOLD = 32 << 20


def keep_freed_memory() -> None:
    """From now on this process keeps what it frees. Does nothing without glibc.

    glibc gives memory back as soon as 64 MiB of it lie free at the end of the heap: after every step what its activations
    held, which the next step then takes page by page again: on CPUs a tenth of its time and more.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # the largest size_t: never
