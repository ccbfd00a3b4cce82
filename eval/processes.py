"""Several processes that answer for one run, each its share of the parts.

Knows that each loads the model from its path. Knows nothing of what is asked, or of how processes share the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm.api import load
from vlm.errors import UsageError
from vlm.processes import Result, Share, in_processes

MEND = "if memory ran out, lower batch or processes; what is answered is kept, run it again to go on"


def answer_in_processes(
    answer: Callable[..., Result], model: Any, plan: Any, kept: Path, processes: int
) -> list[Result]:
    """What `answer(model, plan, kept, share)` returns in each of so many processes, each with the model loaded from its path.

    Raises the first failure, and UsageError for a model that has no path.
    """
    if not isinstance(model, str | Path):
        raise UsageError(f"processes is {processes} and the model is in memory; give its path, or 1 process")
    return in_processes(_work, processes, answer, str(model), plan, kept, mend=MEND)


def _work(answer: Callable[..., Result], model: str, plan: Any, kept: Path, share: Share) -> Result:
    device = share.take()
    return answer(load(model, device=device, at_once=plan.batch), plan, kept, share)
