"""Being told to stop: SIGTERM, as clusters send it some seconds before they kill.

Knows the signal and how ranks agree about it. Knows nothing of what has to be saved.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch

from .ranks import sums


class StopSignal:
    """Within it SIGTERM is noted instead of ending the process, however often it comes; a context manager.

    Launchers pass the signal on to their ranks, each of which gets it at a moment of its own, and some get it twice. In a
    thread other than the main one, where Python takes no signals, it notes nothing.
    """

    def __init__(self) -> None:
        self._came = False
        self._before: Any = None

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = True

    def came(self, device: torch.device) -> bool:
        """Whether any rank was told to stop; the same on every rank, a collective call."""
        (told,) = sums([float(self._came)], device)
        return told > 0
