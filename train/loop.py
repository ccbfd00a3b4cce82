"""The training loop: one for every objective, every ZeRO stage, one process or many.

Knows the order of things: build, stages one after the other, steps, what is logged and saved when. Knows nothing of how a
loss is computed, a batch is made or a weight is stored.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch import distributed as dist

from vlm.augmentation import Augmentation
from vlm.errors import RunError, UsageError
from vlm.files import atomic_write
from vlm.lora import add_lora, base_hash
from vlm.machine import environment, peak_memory_gib
from vlm.model import VLMModel
from vlm.processing import VLMProcessor
from vlm.saving import save
from vlm.settings import annotated_yaml
from vlm.shards import Shards

from .batches import READERS, Batch, MicroBatches, on_device, stream
from .build import build
from .checkpoint import Checkpoints, Progress, full_weights, plain_model
from .config import Augment, Config, Stage
from .deepspeed_config import deepspeed_config, micro_batch_size
from .log import RunLog
from .objectives import OBJECTIVES
from .optimization import choose_trainable, make_optimizer, rate, set_rates, state_bytes
from .order import BLOCK, Order
from .ranks import is_main, join, joined, sums
from .summary import training_table, training_totals
from .validation import validate

# Loss scaling of fp16 finds its scale by overflowing first, some steps in a row.
MOST_SKIPPED = 25


@dataclass
class Run:
    """What all stages of a run share."""

    config: Config
    processor: VLMProcessor
    log: RunLog
    checkpoints: Checkpoints
    train: list[Shards]
    val: Shards | None


def train(config: Config, resume: bool = False, command: str | None = None) -> Path:
    """Train what `config` says and return the folder of the model, OUT/model.

    resume: go on from the newest checkpoint in OUT; else what an earlier run left there is removed, once nothing stands
    against the new one. command: what was typed, for the log; None: this process's own command. Called on every rank.
    Raises UsageError for what cannot be trained, before the first step, and RunError for a run that failed.
    """
    join()
    out = Path(config.out)
    checkpoints = Checkpoints(out, config.checkpoint.keep)
    train_data = [Shards.open(source.path) for source in config.data.train]
    val_data = Shards.open(config.data.val) if config.data.val is not None else None
    for stage in config.stages:
        micro_batch_size(stage, dist.get_world_size())
    if config.precision == "fp16" and not get_accelerator().is_fp16_supported():
        device = get_accelerator().device_name()
        raise UsageError(f"precision fp16 does not work on {device}; use bf16, or fp32")
    if resume:
        progress, folder = checkpoints.latest()
    else:
        progress, folder = Progress(), None
    if progress.stage == len(config.stages):
        raise UsageError(f"the run in {out} is complete; its model is {out / 'model'}, start anew without --resume")
    model, processor = build(config) if progress.stage == 0 else checkpoints.read_start(progress.stage)
    log = RunLog(out, is_main(), append=resume)
    run = Run(config, processor, log, checkpoints, train_data, val_data)
    _check_data(run, model)
    if not resume:
        checkpoints.clear()
    with log, compilation(config, log):
        if is_main():
            with atomic_write(out / "config.yaml", "w") as file:
                file.write(annotated_yaml(config))
        told = environment()
        log.event("started", command=command or told["command"], processes=dist.get_world_size(), environment=told)
        if resume:
            log.event("resumed", stage=progress.stage, step=progress.step)
        while progress.stage < len(config.stages):
            run_stage(run, model, progress, folder)
            progress, folder = Progress(progress.stage + 1), None
            if progress.stage < len(config.stages):
                model, run.processor = checkpoints.read_start(progress.stage)
    return out / "model"


def run_stage(run: Run, model: VLMModel, progress: Progress, folder: Path | None) -> None:
    """Train `model` through one stage, from `progress` on, and leave it for the next, or as OUT/model after the last.

    folder: the checkpoint that `progress` is about, if there is one.
    """
    config, stage = run.config, run.config.stages[progress.stage]
    base = base_hash(model.state_dict()) if stage.lora is not None and is_main() else None
    engine, frozen = start_engine(run, model, progress.stage)
    if folder is not None and progress.step:
        run.checkpoints.load_state(engine, folder)
    micro_steps = engine.gradient_accumulation_steps()
    data = micro_batches(run, model, progress.stage)
    held_out = list(validation_batches(run, model, progress.stage))
    watch = Watch(run)
    # Closed whatever happens: data workers answer no signal and would keep a failed run from ending.
    with closing(stream(data, progress.step * micro_steps, config.data.workers)) as batches:
        while progress.share(stage) < 1.0:
            lr = rate(stage, moment(progress, stage))
            set_rates(engine.optimizer, lr)
            torch.manual_seed(seed_of(config.seed, progress, dist.get_rank()))
            step_batches = list(islice(batches, micro_steps))
            mean_targets = mean_over_step(engine, step_batches)
            for batch in step_batches:
                loss, logs = engine(on_device(batch, engine.device), mean_targets)
                engine.backward(loss)
                grad_norm = take_step(engine)
                watch.see(batch, loss, logs)
            progress = watch.report(engine, progress, grad_norm, lr)
            if progress.step % config.checkpoint.every == 0 and progress.share(stage) < 1.0:
                path = run.checkpoints.save_state(engine, progress)
                run.log.event("checkpoint", path=str(path), **position(progress))
            if held_out and (progress.step % config.validation.every == 0 or progress.share(stage) >= 1.0):
                run.log.event("validation", **position(progress), **validate(engine, held_out))
            watch.restart()
    (memory,) = sums([peak_memory_gib()], engine.device)
    run.log.event("trained", peak_memory_gib=memory, **position(progress))
    leave(run, engine, frozen, progress, base)


def start_engine(run: Run, model: VLMModel, number: int) -> tuple[DeepSpeedEngine, dict[str, Tensor]]:
    """The engine of a stage, and the weights it freezes as they were, where it holds them in fewer bits."""
    config, stage = run.config, run.config.stages[number]
    ds_config = deepspeed_config(config, stage, dist.get_world_size())
    model.set_attn_implementation(config.attention)
    objective = OBJECTIVES[stage.objective](model, stage)
    if stage.lora is not None:
        with torch.random.fork_rng(devices=[]):
            # The updates are born random: the same on every rank, and in a run that begins again with this stage.
            torch.manual_seed(seed_of(config.seed, Progress(number), rank=0))
            add_lora(model, **stage.lora.model_dump())
    choose_trainable(objective, stage)
    in_half = ds_config["bf16"]["enabled"] or ds_config["fp16"]["enabled"]
    optimizer = make_optimizer(model, stage)
    totals = training_totals(model, stage, state_bytes(optimizer, masters=in_half))
    run.log.say(f"stage {number}: {stage.objective}\n{training_table(model, stage)}\n{totals}")
    frozen: dict[str, Tensor] = {}
    if is_main() and in_half:
        every = model.named_parameters(remove_duplicate=False)  # a tied weight is asked for by both its names
        frozen = {name: value.detach() for name, value in every if not value.requires_grad}
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    objective.train()
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=ds_config)
    if config.compile:
        model.vision.compile()
        model.language_model.base_model.compile()
    return engine, frozen


def checkpoint_activations(model: VLMModel) -> None:
    """Keep of each layer of both towers and of the adapters only what goes in; the backward pass computes the rest anew."""
    # transformers 5.24 gave the switch another name.
    switch: Any = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    switch({"use_reentrant": False})
    model.vision.set_grad_checkpointing()


def compilation(config: Config, log: RunLog) -> AbstractContextManager:
    """Within it, torch.compile works if that is asked for and a compiler is there; else nothing is compiled, DeepSpeed's own
    functions included, which on a CPU would take a C++ compiler."""
    can = torch.cuda.is_available() or shutil.which(os.environ.get("CXX", "g++")) is not None
    if config.compile and not can:
        log.say("compile: no C++ compiler is here, so the model runs uncompiled; install g++")
    return torch.compiler.set_stance("default" if config.compile and can else "force_eager")


# Data


def micro_batches(run: Run, model: VLMModel, number: int) -> MicroBatches:
    """The training micro-batches of stage `number` for this rank."""
    stage = run.config.stages[number]
    weights = [source.weight for source in run.config.data.train]
    order = Order([len(source) for source in run.train], weights, [run.config.seed, number])
    size = micro_batch_size(stage, dist.get_world_size())
    return MicroBatches(
        run.train,
        order,
        reader(run, model, stage, augmentation(run.config)),
        size,
        dist.get_rank(),
        dist.get_world_size(),
    )


def validation_batches(run: Run, model: VLMModel, number: int) -> Iterator[Batch]:
    """This rank's part of the first `validation.samples` held-out samples, in whole micro-batches, with all questions."""
    if run.val is None:
        return
    stage = run.config.stages[number].model_copy(update={"questions": None})
    ranks = dist.get_world_size()
    samples = min(run.config.validation.samples, len(run.val))
    size = max(1, min(micro_batch_size(stage, ranks), samples // ranks))
    order = Order([len(run.val)], [1.0], [run.config.seed, number], shuffle=False)
    data = MicroBatches([run.val], order, reader(run, model, stage), size, dist.get_rank(), ranks)
    yield from islice(stream(data, 0, workers=0), max(1, samples // (size * ranks)))


def reader(run: Run, model: VLMModel, stage: Stage, changes: Augmentation | None = None) -> Any:
    """What makes the stage's examples."""
    longest = model.max_tokens or stage.max_tokens
    return READERS[stage.objective](run.processor, stage, longest, model.config.reading == "causal", changes)


def augmentation(config: Config) -> Augmentation | None:
    """The changes of training pictures; None where there are none."""
    return Augmentation(**config.data.augment.model_dump()) if config.data.augment != Augment() else None


def _check_data(run: Run, model: VLMModel) -> None:
    """Raise UsageError now where a stage would later find nothing to train on in one of its sources."""
    for number in range(len(run.config.stages)):
        data = micro_batches(run, model, number)
        first_of_source = {data.order.at(position)[0]: position for position in reversed(range(BLOCK))}
        try:
            for first in sorted(first_of_source.values()):
                data.example(first, [])
        except UsageError as error:
            raise UsageError(f"stages.{number}: {error}") from None


# Steps


def moment(progress: Progress, stage: Stage) -> float:
    """The share of the stage at which the next step stands: its middle, so that neither end's rate of 0 is wasted on one."""
    return progress.share(stage) + (0.5 / stage.steps if stage.steps is not None else 0.0)


def seed_of(seed: int, progress: Progress, rank: int) -> int:
    """The seed of dropout in a step on a rank; by it a resumed run draws what the straight one would have drawn."""
    return int(np.random.SeedSequence([seed, progress.stage, progress.step, rank]).generate_state(1)[0])


def mean_over_step(engine: DeepSpeedEngine, batches: list[Batch]) -> float:
    """The mean number of targets over the micro-batches of a step and over ranks."""
    own = sum(engine.module.targets(batch) for batch in batches)
    (everything,) = sums([own], engine.device)
    return max(1.0, everything) / (len(batches) * dist.get_world_size())


def take_step(engine: DeepSpeedEngine) -> float:
    """`engine.step()`; returns the norm of the gradient before clipping where that updates the weights, else 0.

    With Muon under ZeRO it is the norm of Muon's updates and of the other gradients together.

    A gradient that is not finite changes no weight. ZeRO sees to both itself; without it nobody does.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return 0.0
    if engine.zero_optimization():
        engine.step()
        return float(engine.get_global_grad_norm())
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if not math.isfinite(norm):
        # Zeros, not None: DeepSpeed's clipping fails where no gradient is left at all.
        torch._foreach_zero_(gradients)
        set_rates(engine.optimizer, 0.0)
    engine.step()
    return norm


class Watch:
    """Adds up what a step's micro-batches tell, and writes the step's line. Time runs on between steps, not beside them."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.skipped_in_a_row = 0
        self.passed_over: set[tuple[str, str]] = set()
        self.restart()

    def restart(self) -> None:
        """Start the clock: the time since the last step was not training."""
        self.started = time.perf_counter()
        self.seen: list[tuple[Batch, Tensor, dict[str, Tensor]]] = []

    def see(self, batch: Batch, loss: Tensor, logs: dict[str, Tensor]) -> None:
        """Remember one micro-batch."""
        counted = {"samples": batch["samples"], "tokens": batch["tokens"], "skipped": batch["skipped"]}
        self.seen.append((counted, loss.detach(), logs))

    def report(self, engine: DeepSpeedEngine, progress: Progress, grad_norm: float, lr: float) -> Progress:
        """The progress after this step, the same on every rank, and its line in the log; a collective call."""
        totals: Counter[str] = Counter()
        for _, loss, logs in self.seen:
            totals.update({"loss": float(loss)} | {name: float(value) for name, value in logs.items()})
        means = len(self.seen) * dist.get_world_size()
        counts = [sum(counted[name] for counted, _, _ in self.seen) for name in ("samples", "tokens")]
        skipped = {pair for counted, _, _ in self.seen for pair in counted["skipped"]} - self.passed_over
        seconds = time.perf_counter() - self.started if is_main() else 0.0
        own = [*totals.values(), *counts, len(skipped), seconds]
        *values, samples, tokens, anything_skipped, seconds = sums(own, engine.device)
        logged = {name: value / means for name, value in zip(totals, values, strict=True)}
        progress = replace(
            progress,
            step=progress.step + 1,
            seconds=progress.seconds + seconds,
            samples=progress.samples + int(samples),
            tokens=progress.tokens + int(tokens),
        )
        if anything_skipped:
            self._tell_skipped_samples(joined(sorted(skipped)), progress)
        self._check_finite(progress, logged["loss"], grad_norm)
        self.run.log.step(
            progress=progress.share(self.run.config.stages[progress.stage]),
            stage=progress.stage,
            step=progress.step,
            **{"loss": logged.pop("loss"), "lr": lr, "grad_norm": grad_norm},
            samples=progress.samples,
            tokens=progress.tokens,
            samples_per_second=samples / seconds,
            seconds=progress.seconds,
            **logged,
        )
        return progress

    def _tell_skipped_samples(self, skipped: list[tuple[str, str]], progress: Progress) -> None:
        """One event for each sample and reason, whichever rank met it, and however often."""
        for key, reason in dict.fromkeys(skipped):
            self.run.log.event("skipped_sample", key=key, reason=reason, **position(progress))
        self.passed_over.update(skipped)

    def _check_finite(self, progress: Progress, loss: float, grad_norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        self.run.log.event("nonfinite", loss=loss, grad_norm=grad_norm, **position(progress))
        if self.skipped_in_a_row == MOST_SKIPPED:
            raise RunError(
                f"loss {loss} and gradient norm {grad_norm} for {MOST_SKIPPED} steps in a row, up to step {progress.step}; "
                "lower lr, or use precision fp32"
            )


def position(progress: Progress) -> dict[str, Any]:
    """Where in the run an event happened."""
    return {"stage": progress.stage, "step": progress.step, "seconds": progress.seconds, "samples": progress.samples}


# The end of a stage


def leave(run: Run, engine: DeepSpeedEngine, frozen: dict[str, Tensor], progress: Progress, base: str | None) -> None:
    """Write what the next stage starts from, or OUT/model after the last; take the engine apart. A collective call."""
    stage, out = run.config.stages[progress.stage], Path(run.config.out)
    weights = full_weights(engine, frozen)
    trained = engine.module.model
    engine.destroy()
    if is_main():
        model = plain_model(trained, weights, stage, base, out / "adapter")
        following = Progress(progress.stage + 1)
        if following.stage < len(run.config.stages):
            run.checkpoints.save_start(model, run.processor, following)
        else:
            save(model, run.processor, out / "model")
            run.checkpoints.finish(following)
    dist.barrier()
