"""Models that several processes hold: the tests of `together.py`, each time in a process that is in no group yet.

What trains in a process of the suite leaves DeepSpeed's process group there, and a process is in one group at a time.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def passed(*options: str) -> None:
    """Run the tests of the file beside this one that these options choose; all of them must pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *options]
    done = subprocess.run([*command, "tests/serve/together.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]


def test_a_model_held_by_several_processes():
    passed()


@pytest.mark.heavy
def test_replicas_of_several_processes():
    passed("-m", "heavy")
