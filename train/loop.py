"""The training loop: one for every objective, every ZeRO stage, one process or many.

Knows the order of things: build, stages one after the other, steps, what is logged and saved when. Knows nothing of how a
loss is computed, a batch is made or a weight is stored.
"""

from __future__ import annotations

import math
import os
import shutil
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
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

from vlm.errors import RunError, UsageError
from vlm.files import atomic_write
from vlm.lora import add_lora, base_hash
from vlm.machine import environment, peak_memory_gib
from vlm.model import VLMModel
from vlm.processing import VLMProcessor
from vlm.saving import save
from vlm.settings import annotated_yaml

from .average import Average
from .batches import Batch, on_device, stream
from .boards import check_boards
from .build import build
from .checkpoint import Adapter, Checkpoints, Progress, full_weights, plain_model
from .config import Config
from .config_stage import Stage
from .data import RunData
from .deepspeed_config import clip_of, deepspeed_config
from .flops import ModelFlops, peak_flops
from .gauges import gradient_norms, look
from .log import RunLog
from .objectives import OBJECTIVES
from .optimization import check_stages, choose_trainable, make_optimizer, rate, set_rates, state_bytes
from .quantized import check_quantized, original, quantize_base
from .ranks import data_rank, data_ranks, is_main, join, sums
from .resuming import check_resumed
from .step import prepare
from .stopping import StopSignal
from .summary import training_table, training_totals
from .tensor_parallel import check_model, check_settings, norm_over_shares
from .validation import validate
from .watch import Tally, Watch

# Tokens of a row for which plain attention on a CPU is worth its memory.
SHORT = 1024


@dataclass
class Run:
    """What all stages of a run share."""

    config: Config
    data: RunData
    processor: VLMProcessor
    log: RunLog
    checkpoints: Checkpoints
    stop: StopSignal


def train(config: Config, resume: bool = False, command: str | None = None) -> Path:
    """Train what `config` says and return the folder of the model, OUT/model.

    resume: go on from the newest checkpoint in OUT; else what an earlier run left there is removed, once nothing stands
    against the new one. command: what was typed, for the log; None: this process's own command. Called on every rank.
    Raises UsageError for what cannot be trained, before the first step, and RunError for a run that failed.
    """
    check_settings(config)
    join(config.tensor_parallel)
    out = Path(config.out)
    checkpoints = Checkpoints(out, config.checkpoint.keep)
    data = RunData.open(config)
    if config.precision == "fp16" and not get_accelerator().is_fp16_supported():
        device = get_accelerator().device_name()
        raise UsageError(f"precision fp16 does not work on {device}; use bf16, or fp32")
    check_boards(config.log)
    progress, folder = Progress(), None
    if resume:
        progress, folder = checkpoints.latest()
        check_resumed(config, progress)
        model, processor = checkpoints.read_start(progress.stage)
    else:
        checkpoints.check_place()
        model, processor = build(config)
    check_from_here(config, data, model, processor, progress)
    log = RunLog(out, is_main(), append=resume, boards=config.log)
    run = Run(config, data, processor, log, checkpoints, StopSignal())
    if not resume:
        checkpoints.clear()
    with log, run.stop, compilation(config, log):
        if is_main():
            with atomic_write(out / "config.yaml", "w") as file:
                file.write(annotated_yaml(config))
        told = environment()
        log.event("started", command=command or told["command"], processes=dist.get_world_size(), environment=told)
        if resume:
            log.event("resumed", stage=progress.stage, step=progress.step)
        elif is_main():
            checkpoints.save_start(model, processor, progress)
        while progress.stage < len(config.stages):
            run_stage(run, model, progress, folder)
            progress, folder = Progress(progress.stage + 1), None
            if progress.stage < len(config.stages):
                model, run.processor = checkpoints.read_start(progress.stage)
    return out / "model"


def check_from_here(
    config: Config, data: RunData, model: VLMModel, processor: VLMProcessor, progress: Progress
) -> None:
    """Raise UsageError for what some stage to come cannot do with this model and these data."""
    check_model(model, config.tensor_parallel)
    for stage in config.stages:
        deepspeed_config(config, stage, data_ranks(), family_of(model))
    check_quantized(config, model)
    check_stages(config.stages, model, progress.stage)
    data.check(model, processor)


def run_stage(run: Run, model: VLMModel, progress: Progress, folder: Path | None) -> None:
    """Train `model` through one stage, from `progress` on, and leave it for the next, or as OUT/model after the last.

    folder: the checkpoint that `progress` is about, if there is one.
    """
    config, stage = run.config, run.config.stages[progress.stage]
    base = base_hash(model.state_dict()) if stage.lora is not None and is_main() else None
    engine, frozen = start_engine(run, model, progress.stage)
    average = Average(engine, stage.ema) if stage.ema is not None else None
    if folder is not None and progress.step:
        scales = [group["scale"] for group in engine.optimizer.param_groups]
        run.checkpoints.load_state(engine, average, folder)
        for group, scale in zip(engine.optimizer.param_groups, scales, strict=True):
            group["scale"] = scale  # like lr, what the config says now and not what it said then
    micro_steps = engine.gradient_accumulation_steps()
    data = run.data.micro_batches(model, run.processor, progress.stage)
    held_out = list(run.data.validation_batches(model, run.processor, progress.stage))
    flops = ModelFlops(engine.module)
    watch = Watch(run.log, *sums([peak_flops(engine.device, config.precision)], engine.device))
    # Closed whatever happens: data workers answer no signal and would keep a failed run from ending.
    with closing(stream(data, progress.step * micro_steps, config.data.workers)) as batches:
        while not progress.is_over(stage, config.validation.patience):
            tally = Tally(watch.passed_over)
            lr = rate(stage, moment(progress, stage))
            set_rates(engine.optimizer, lr)
            torch.manual_seed(seed_of(config.seed, progress, data_rank()))
            step_batches = list(islice(batches, micro_steps))
            seen: dict[str, Any] = {}
            for batch, plan in zip(step_batches, prepare(engine, step_batches), strict=True):
                loss, logs = engine(on_device(batch, engine.device), plan)
                engine.backward(loss)
                if is_watched(config, progress) and engine.is_gradient_accumulation_boundary():
                    seen["grad_norms"] = gradient_norms(engine)
                grad_norm = take_step(engine)
                tally.add(batch, flops(batch), loss, logs)
            if average is not None:
                average.update()
            totals = tally.totals(engine.device)
            if is_watched(config, progress):
                seen |= look(engine, step_batches[0])
            progress = progress.after(totals.samples, totals.tokens, totals.seconds)
            watch.report(totals, progress, progress.share(stage), grad_norm, lr, seen)
            if held_out and (progress.step % config.validation.every == 0 or progress.share(stage) >= 1.0):
                with average.in_place() if average is not None else nullcontext():
                    progress = judge(run, engine, frozen, held_out, progress)
            save_in_time(run, engine, average, progress)
    (memory,) = sums([peak_memory_gib()], engine.device)
    run.log.event("trained", peak_memory_gib=memory, **progress.position())
    if average is not None:
        average.swap()
    leave(run, engine, frozen, progress, base)


def start_engine(run: Run, model: VLMModel, number: int) -> tuple[DeepSpeedEngine, dict[str, Tensor]]:
    """The engine of a stage, and the weights it freezes as they were, where it holds them in fewer bits."""
    config, stage = run.config, run.config.stages[number]
    ds_config = deepspeed_config(config, stage, data_ranks(), family_of(model))
    quantize_base(config, model)
    model.set_attn_implementation(attention_of(config, stage))
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
    if is_main() and in_half and config.model.quantize is None:
        every = model.named_parameters(remove_duplicate=False)  # a tied weight is asked for by both its names
        frozen = {name: value.detach() for name, value in every if not value.requires_grad}
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    objective.train()
    if config.zero == 0:
        ds_config["gradient_clipping"] = 0.0  # `take_step` knows the norm already
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=ds_config)
    if config.zero == 0 and data_ranks() == 1:
        # The mean over one rank is the gradient itself; DeepSpeed would copy all gradients twice to find it.
        engine.enable_backward_allreduce = False
    if config.tensor_parallel > 1:
        # It compares the batches of ranks that should have the same one, and fails where a batch is a dict.
        engine.first_dataloader_check.remove()
    if config.compile:
        model.vision.compile()
        model.language_model.base_model.compile()
    return engine, frozen


def family_of(model: VLMModel) -> str:
    """Of its language model."""
    return model.config.text_config.model_type


def attention_of(config: Config, stage: Stage) -> str:
    """The name of the attention that a stage trains with: what is asked for, or what is fastest where it runs."""
    if config.attention != "auto":
        return config.attention
    # Forward and backward of short rows on a CPU; see `vlm.adapters.CrossAttention`. Long ones would fill the memory.
    short = stage.max_tokens <= SHORT and get_accelerator().device_name() == "cpu"
    return "eager" if short else "sdpa"


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


# Steps


def moment(progress: Progress, stage: Stage) -> float:
    """The share of the stage at which the next step stands: its middle, so that neither end's rate of 0 is wasted on one."""
    return progress.share(stage) + (0.5 / stage.steps if stage.steps is not None else 0.0)


def seed_of(seed: int, progress: Progress, rank: int) -> int:
    """The seed of dropout in a step on a rank; by it a resumed run draws what the straight one would have drawn."""
    return int(np.random.SeedSequence([seed, progress.stage, progress.step, rank]).generate_state(1)[0])


def take_step(engine: DeepSpeedEngine) -> float:
    """`engine.step()`; returns the norm of the gradient before clipping where that updates the weights, else 0.

    With Muon under ZeRO it is the norm of Muon's updates and of the other gradients together.

    A gradient that is not finite changes no weight. ZeRO sees to this and to clipping itself; without it nobody does.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return 0.0
    if engine.zero_optimization():
        engine.step()
        return float(engine.get_global_grad_norm())
    held = []
    for parameter in engine.module.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)  # as DeepSpeed does where it has ranks to average over
        if parameter.grad is not None:
            held.append((parameter, parameter.grad))
    norm, most = norm_over_shares(held), clip_of(engine.module.stage)
    if not math.isfinite(norm):
        torch._foreach_zero_([gradient for _, gradient in held])
        set_rates(engine.optimizer, 0.0)
    elif most and norm > most:
        torch._foreach_mul_([gradient for _, gradient in held], most / norm)
    engine.step()
    return norm


def is_watched(config: Config, progress: Progress) -> bool:
    """Whether the log tells more of the step that comes after `progress`."""
    return config.watch.every > 0 and (progress.step + 1) % config.watch.every == 0


def judge(
    run: Run, engine: DeepSpeedEngine, frozen: dict[str, Tensor], held_out: list[Batch], progress: Progress
) -> Progress:
    """Validate; in the last stage keep the model in OUT/best if it is the best so far and that is asked for."""
    result = validate(engine, held_out)
    run.log.validation(**progress.position(), **result)
    progress = progress.judged(result["loss"])
    is_last = progress.stage == len(run.config.stages) - 1
    if run.config.validation.keep_best and is_last and progress.since_best == 0:
        folder = Path(run.config.out) / "best"
        weights = full_weights(engine, frozen)
        if is_main():
            full = original(run.config, run.checkpoints, progress.stage)
            save(plain_model(engine.module.model, weights, engine.module.stage, full), run.processor, folder)
        run.log.event("best", loss=progress.best_loss, path=str(folder), **progress.position())
    return progress


def save_in_time(run: Run, engine: DeepSpeedEngine, average: Average | None, progress: Progress) -> None:
    """Write a checkpoint when it is due. Raises RunError, with one written, where the run was told to stop."""
    told_to_stop = run.stop.came(engine.device)
    if progress.is_over(run.config.stages[progress.stage], run.config.validation.patience):
        return  # what the stage leaves is written next, and the stage after it hears of the signal
    if told_to_stop or progress.step % run.config.checkpoint.every == 0:
        path = run.checkpoints.save_state(engine, average, progress)
        run.log.event("checkpoint", path=str(path), **progress.position())
    if told_to_stop:
        run.log.event("stopped", **progress.position())
        raise RunError(
            f"stopped by SIGTERM after step {progress.step} of stage {progress.stage}; all of it is in {path}, and the "
            "same command with --resume goes on from there"
        )


# The end of a stage


def leave(run: Run, engine: DeepSpeedEngine, frozen: dict[str, Tensor], progress: Progress, base: str | None) -> None:
    """Write what the next stage starts from, or OUT/model after the last; take the engine apart. A collective call.

    base: hash of the weights that a stage with LoRA started from, on the main rank.
    """
    stage, out = run.config.stages[progress.stage], Path(run.config.out)
    weights = full_weights(engine, frozen)
    trained = engine.module.model
    engine.destroy()
    if is_main():
        full = original(run.config, run.checkpoints, progress.stage)
        # An update that a stage before has left is not one of what this stage leaves.
        shutil.rmtree(out / "adapter", ignore_errors=True)
        adapter = None if base is None else Adapter(out / "adapter", base, run.checkpoints.start(progress.stage))
        model = plain_model(trained, weights, stage, full, adapter)
        following = Progress(progress.stage + 1)
        if following.stage < len(run.config.stages):
            run.checkpoints.save_start(model, run.processor, following)
        else:
            save(model, run.processor, out / "model")
            run.checkpoints.finish(following)
    dist.barrier()
