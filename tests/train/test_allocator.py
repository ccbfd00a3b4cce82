"""Memory that is kept: a process of its own takes blocks, frees them and takes them again."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ALLOCATOR = Path(__file__).parents[2] / "train" / "allocator.py"
BLOCKS, SIZE = 100, 4 << 20
AGAIN = f"""
import ctypes, resource, runpy, sys
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def use():
    blocks = [libc.malloc({SIZE}) for _ in range({BLOCKS})]
    for block in blocks:
        ctypes.memset(block, 1, {SIZE})
    for block in blocks:
        libc.free(block)

if sys.argv[1:]:
    runpy.run_path(sys.argv[1])["keep_freed_memory"]()
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*arguments: str) -> int:
    """Pages that the second use of the same blocks took from the system."""
    done = subprocess.run([sys.executable, "-c", AGAIN, *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_what_was_freed_is_taken_again_without_asking_the_system():
    pages = BLOCKS * SIZE // 4096
    assert faults() > pages / 2
    assert faults(str(ALLOCATOR)) < pages / 100
