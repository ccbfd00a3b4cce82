"""What a run can go on from, and what it leaves: resumable states, the model between two stages, the model at the end.

Knows folders, DeepSpeed's checkpoints and how weights come together from all ranks. Knows nothing of the loop that asks.

OUT/checkpoints/ holds `latest`, the name of a folder beside it, and such folders: `stage0-step500/` with DeepSpeed's
`state/`, or `stage1-start/` with the `model/` that stage 0 left; each with `progress.json`, written last. Every folder
appears whole, by renaming, before `latest` names it. `stage0-start/` is what the run began with, so that going on takes
nothing from elsewhere: not the base model, which may lie in OUT itself, nor a tokenizer made anew from data that have grown.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine, zero
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn
from torch import distributed as dist

from vlm.errors import RunError, UsageError
from vlm.files import atomic_folder, atomic_write
from vlm.lora import add_lora, merge_lora, save_lora
from vlm.model import VLMModel
from vlm.processing import VLMProcessor
from vlm.saving import read, save

from .average import Average
from .config_stage import Stage
from .ranks import copies, is_main
from .tensor_parallel import whole

LATEST, PROGRESS, STATE, MODEL = "latest", "progress.json", "state", "model"
LEFT = ("checkpoints", "model", "adapter", "best", "tensorboard")  # what a run leaves in OUT, and the next one removes


@dataclass(frozen=True)
class Progress:
    """How far a run has come. seconds: training time of the stage; samples, tokens: seen in the stage by all ranks.

    best_loss: the lowest of the stage's validations; since_best: how many have come after it.
    """

    stage: int = 0
    step: int = 0
    seconds: float = 0.0
    samples: int = 0
    tokens: int = 0
    best_loss: float | None = None
    since_best: int = 0

    def after(self, samples: int, tokens: int, seconds: float) -> Progress:
        """The progress after one more step, which saw and took so much."""
        return replace(
            self,
            step=self.step + 1,
            seconds=self.seconds + seconds,
            samples=self.samples + samples,
            tokens=self.tokens + tokens,
        )

    def judged(self, loss: float) -> Progress:
        """The progress after a validation."""
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            return replace(self, best_loss=loss, since_best=0)
        return replace(self, since_best=self.since_best + 1)

    def position(self) -> dict[str, Any]:
        """Where in the run an event happened."""
        return {"stage": self.stage, "step": self.step, "seconds": self.seconds, "samples": self.samples}

    def share(self, stage: Stage) -> float:
        """How much of the stage is done, 0 to 1."""
        if stage.steps is not None:
            return min(1.0, self.step / stage.steps)
        assert stage.minutes is not None
        return min(1.0, self.seconds / (60 * stage.minutes))

    def is_over(self, stage: Stage, patience: int | None) -> bool:
        """Whether the stage has come to its end, or so many validations in a row found nothing better."""
        return self.share(stage) >= 1.0 or (patience is not None and self.since_best >= patience)


class Checkpoints:
    """The checkpoints of one run. keep: how many states stay."""

    def __init__(self, out: Path, keep: int) -> None:
        self.out = out
        self.folder = out / "checkpoints"
        self.keep = keep

    def check_place(self) -> None:
        """Raise UsageError where OUT holds what `clear` would remove and no run has left."""
        theirs = [name for name in LEFT if (self.out / name).exists()]
        if theirs and not (self.out / "log.jsonl").exists():
            raise UsageError(
                f"out {self.out} holds {', '.join(theirs)} and no log.jsonl, so no run has left that; choose another out, or "
                "move it away"
            )

    def clear(self) -> None:
        """Remove what an earlier run left in the same place: it would look like this one's."""
        dist.barrier()  # a rank may still read the model that it goes on from
        if is_main():
            for name in LEFT:
                shutil.rmtree(self.out / name, ignore_errors=True)
        dist.barrier()

    def latest(self) -> tuple[Progress, Path]:
        """The newest state and its folder. Raises UsageError where there is none, or not all of it, or of other ranks."""
        marker = self.folder / LATEST
        if not marker.is_file():
            raise UsageError(f"there is no {marker} to resume from; start without --resume, or name the run's own out=")
        folder = self.folder / marker.read_text("utf-8").strip()
        try:
            told = json.loads((folder / PROGRESS).read_text("utf-8"))
            ranks, files, together = told.pop("ranks"), told.pop("files"), told.pop("tensor_parallel")
            progress = Progress(**told)
        except (OSError, ValueError, KeyError, TypeError):
            kept = ", ".join(sorted(path.parent.name for path in self.folder.glob(f"*/{PROGRESS}"))) or "none"
            raise UsageError(
                f"{marker} names {folder.name}, which is not whole; write one of these into it: {kept}"
            ) from None
        for name, size in files.items():
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
            if found != size:
                raise UsageError(
                    f"{folder / name} has {found} bytes and should have {size}; write an older one into {marker}"
                )
        if (folder / STATE).is_dir() and ranks != dist.get_world_size():
            raise UsageError(
                f"{folder} was written by {ranks} processes and this run has {dist.get_world_size()}; resume with {ranks}"
            )
        if (folder / STATE).is_dir() and together != copies():
            raise UsageError(
                f"{folder} was written with tensor_parallel {together} and this run has {copies()}; resume with {together}"
            )
        return progress, folder

    def save_state(self, engine: DeepSpeedEngine, average: Average | None, progress: Progress) -> Path:
        """Write what the stage can go on from bit by bit; a collective call. Raises RunError where the disk refuses."""
        folder = self.folder / f"stage{progress.stage}-step{progress.step}"
        fresh = self.folder / f".{folder.name}.new"
        if is_main():
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
        dist.barrier()
        try:
            if average is not None:
                average.save(fresh)
            engine.save_checkpoint(str(fresh), tag=STATE, save_latest=False)
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise RunError(f"checkpoint {folder} cannot be written: {reason}; free the disk and resume") from error
        if is_main():
            self._write_progress(fresh, progress)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(fresh, folder)
            self._point_to(folder)
            self._prune()
        dist.barrier()
        return folder

    def load_state(self, engine: DeepSpeedEngine, average: Average | None, folder: Path) -> None:
        """Put back what `save_state` wrote into an engine made in the same way; a collective call."""
        loaded, _ = engine.load_checkpoint(str(folder), tag=STATE)
        if loaded is None:
            raise RunError(f"DeepSpeed found nothing in {folder}; write an older state into {self.folder / LATEST}")
        if average is not None:
            average.load(folder)

    def save_start(self, model: VLMModel, processor: VLMProcessor, progress: Progress) -> None:
        """Write what a stage starts from; by the main rank alone."""
        folder = self.start(progress.stage).parent
        with atomic_folder(folder) as fresh:
            save(model, processor, fresh / MODEL)
            self._write_progress(fresh, progress)
        self._point_to(folder)

    def start(self, stage: int) -> Path:
        """The folder of the model that a stage starts from."""
        return self.folder / f"stage{stage}-start" / MODEL

    def read_start(self, stage: int) -> tuple[VLMModel, VLMProcessor]:
        """The model, in float32, that a stage starts from."""
        return read(self.start(stage), dtype="float32")

    def finish(self, progress: Progress) -> None:
        """Note that there is nothing left to resume; by the main rank alone."""
        folder = self.folder / "finished"
        with atomic_folder(folder) as fresh:
            self._write_progress(fresh, progress)
        self._point_to(folder)

    def _write_progress(self, folder: Path, progress: Progress) -> None:
        files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        with atomic_write(folder / PROGRESS, "w") as file:
            made_by = {"ranks": dist.get_world_size(), "tensor_parallel": copies()}
            json.dump(asdict(progress) | made_by | {"files": files}, file, indent=1)

    def _point_to(self, folder: Path) -> None:
        with atomic_write(self.folder / LATEST, "w") as file:
            file.write(folder.name + "\n")

    def _prune(self) -> None:
        states = [path.parent for path in self.folder.glob(f"*/{STATE}")]
        for old in sorted(states, key=lambda path: path.stat().st_mtime)[: -self.keep]:
            shutil.rmtree(old)


# Weights from all ranks


def full_weights(engine: DeepSpeedEngine, frozen: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every weight and buffer of the model, whole, in float32 on the CPU, on the main rank; a collective call.

    frozen: the float32 values of weights that the engine holds in fewer bits and does not train. Raises RunError for an
    empty tensor.
    """
    model = engine.module.model
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        value = frozen.get(name, _full(parameter))  # asked for of every rank, for it may take all of them
        if is_main():
            weights[name] = value.detach().to("cpu", torch.float32, copy=True)
    persistent = model.state_dict().keys()
    weights |= {name: value.detach().cpu().clone() for name, value in model.named_buffers() if name in persistent}
    if is_main() and (empty := [name for name, value in weights.items() if value.numel() == 0]):
        raise RunError(
            f"{len(empty)} of {len(weights)} weights came back empty, the first {empty[0]}; nothing was saved"
        )
    return weights


def _full(parameter: nn.Parameter) -> Tensor:
    return whole(parameter, _own(parameter))


def _own(parameter: nn.Parameter) -> Tensor:
    """In float32 if it trains; under tensor parallelism this rank's share."""
    if parameter.requires_grad and parameter.dtype != torch.float32:
        return safe_get_full_fp32_param(parameter)
    if hasattr(parameter, "ds_id"):
        with zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter


@dataclass(frozen=True)
class Adapter:
    """Where a stage with LoRA leaves what it trained. base, start: hash of weights, and folder, of what it started from."""

    folder: Path
    base: str
    start: Path


def plain_model(
    trained: VLMModel,
    weights: dict[str, Tensor],
    stage: Stage,
    original: VLMModel | None = None,
    adapter: Adapter | None = None,
) -> VLMModel:
    """A model of its own with `weights` (of `full_weights`), LoRA merged into it; by the main rank alone.

    original: what the stage began with, for one that holds it quantized; what did not train stays as it is there, in full.
    adapter: with LoRA, where to write what the stage trained.
    """
    if original is None:
        with torch.random.fork_rng(devices=[]):
            model = VLMModel(trained.config)
    else:
        model = original
    if stage.lora is not None:
        add_lora(model, **stage.lora.model_dump())
    if original is not None:
        kept = model.state_dict()
        frozen = {name for name, value in trained.named_parameters(remove_duplicate=False) if not value.requires_grad}
        weights = kept | {name: value for name, value in weights.items() if name in kept and name not in frozen}
    model.load_state_dict(weights)
    if stage.lora is None:
        return model
    if adapter is not None:
        others = {
            name: weights[name]
            for name, parameter in trained.named_parameters()
            if parameter.requires_grad and "lora_" not in name
        }
        save_lora(model, adapter.folder, adapter.base, others, trained.config.quantization, adapter.start)
    merge_lora(model)
    return model
