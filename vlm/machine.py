"""What a number was measured on: machine, versions, command. Knows nothing of what was measured."""

from __future__ import annotations

import os
import platform
import resource
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("vlm", "torch", "transformers", "timm", "deepspeed", "peft", "pillow")


def environment() -> dict[str, Any]:
    """The machine, the versions of what matters, and the command that runs now; plain JSON values."""
    return {
        "command": command_line(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def command_line() -> str:
    """This process's command as one would type it again."""
    program = Path(sys.argv[0]).name
    start = ["python", "-m", "vlm.train"] if program == "__main__.py" else [program]
    return shlex.join([*start, *sys.argv[1:]])


def peak_memory_gib() -> float:
    """The most memory this process has held so far, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**30 if sys.platform == "darwin" else 2**20), 2)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
