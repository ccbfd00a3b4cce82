"""Where curves are drawn: TensorBoard always, Weights & Biases and trackio when a run asks for them.

Knows these programs' calls. Knows nothing of what is drawn, or of any account: both write to this machine, unless the
environment says otherwise (`WANDB_MODE=online`; `TRACKIO_SPACE_ID`).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Protocol

from vlm.errors import UsageError

from .config import Log


class Board(Protocol):
    """Something that draws curves."""

    def add(self, stage: int, step: int, values: Mapping[str, float]) -> None:
        """Points of a stage's curves at a step."""

    def close(self) -> None:
        """Finish what is being written."""


class TensorBoard:
    """Event files in OUT/tensorboard."""

    def __init__(self, out: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(out / "tensorboard"))

    def add(self, stage: int, step: int, values: Mapping[str, float]) -> None:
        """Points of a stage's curves at a step."""
        for name, value in values.items():
            self._writer.add_scalar(f"stage{stage}/{name}", value, step)

    def close(self) -> None:
        """Finish what is being written."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases in OUT/wandb, offline unless `WANDB_MODE` says otherwise; `wandb sync` uploads it later."""

    def __init__(self, project: str, out: Path, resumed: bool) -> None:
        wandb = installed("wandb")
        marker = out / "wandb" / "vlm-run-id"
        known = marker.read_text("utf-8") if resumed and marker.is_file() else None
        (out / "wandb").mkdir(exist_ok=True)
        self._run = wandb.init(
            project=project,
            name=out.name,
            id=known,
            resume="allow" if known else None,
            dir=str(out),
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=wandb.Settings(silent=True, console="off"),
        )
        marker.write_text(self._run.id, "utf-8")
        self._stages: set[int] = set()

    def add(self, stage: int, step: int, values: Mapping[str, float]) -> None:
        """Points of a stage's curves at a step."""
        if stage not in self._stages:
            # Steps begin anew in every stage, and W&B's own count may only rise.
            self._run.define_metric(f"stage{stage}/*", step_metric=f"stage{stage}/step")
            self._stages.add(stage)
        self._run.log({f"stage{stage}/{name}": value for name, value in {**values, "step": step}.items()})

    def close(self) -> None:
        """Finish what is being written."""
        self._run.finish()


class Trackio:
    """A run of trackio, in its own folder on this machine (`TRACKIO_DIR`); `trackio show` draws it."""

    def __init__(self, project: str, out: Path, resumed: bool) -> None:
        trackio = installed("trackio")
        self._run = trackio.init(project=project, name=out.name, resume="allow" if resumed else "never", embed=False)

    def add(self, stage: int, step: int, values: Mapping[str, float]) -> None:
        """Points of a stage's curves at a step."""
        self._run.log({f"stage{stage}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Finish what is being written."""
        self._run.finish()


def open_boards(settings: Log, out: Path, resumed: bool) -> list[Board]:
    """The boards that a run asks for. Raises UsageError where one is not installed."""
    boards: list[Board] = [TensorBoard(out)]
    if settings.wandb is not None:
        boards.append(Wandb(settings.wandb, out, resumed))
    if settings.trackio is not None:
        boards.append(Trackio(settings.trackio, out, resumed))
    return boards


def check_boards(settings: Log) -> None:
    """Raise UsageError for a board that is asked for and not installed."""
    for name, project in settings.model_dump().items():
        if project is not None:
            installed(name)


def installed(name: str) -> ModuleType:
    """The package, imported. Raises UsageError where it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UsageError(
            f"log.{name} is set, and {name} is not installed; pip install 'vlm[{name}]', or remove it"
        ) from None
