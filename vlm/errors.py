"""The two errors a person meets. Knows what their exit codes mean; knows nothing of who raises or prints them.

Both carry one line: the thing, the numbers, the mend. `vlm.cli` prints it as `error: …` and exits.
"""

from __future__ import annotations


class UsageError(Exception):
    """Bad usage, config or input: the caller can mend it and try again. Exit code 2."""


class RunError(Exception):
    """A run that was asked for properly and failed. Exit code 1."""
