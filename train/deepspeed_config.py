"""The DeepSpeed configuration of one stage: what the config says, filled into what the user gave of DeepSpeed's own.

Knows DeepSpeed's key names. Knows nothing of engines or models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deepspeed.ops.op_builder import AsyncIOBuilder

from vlm.errors import UsageError

from .config import Config
from .config_stage import Stage
from .optimization import BETAS, EPS
from .tensor_parallel import layer_specs

AUTO = "auto"


def deepspeed_config(config: Config, stage: Stage, world_size: int, family: str = "") -> dict[str, Any]:
    """DeepSpeed's JSON for `stage` on `world_size` ranks, or groups of `tensor_parallel` that hold one model together.

    family: of the language model, which tensor parallelism cuts up.

    Optimizer and schedule are the loop's own: a section `optimizer` has to say what it does, and one for `scheduler` is
    refused. `"auto"` values are filled in, or left to DeepSpeed's default where the config has nothing to say. Raises
    UsageError with both values where the user's DeepSpeed settings and the config differ, or the batch does not divide over
    the ranks.
    """
    merged = _load(config.deepspeed)
    if "scheduler" in merged:
        raise UsageError(
            f"deepspeed: scheduler is set, and warmup {stage.warmup:g} and schedule {stage.schedule} of the {stage.objective} "
            "stage say how its rate goes; remove it"
        )
    _fill(merged, {**_batches(stage, world_size), **_precision(config, merged), **_rest(config, stage)}, stage, "")
    _drop_auto(merged)
    _check_optimizer(merged.get("optimizer", {}))
    if config.tensor_parallel > 1:
        if "partition_config" in merged["tensor_parallel"]:
            raise UsageError(
                f"deepspeed: tensor_parallel.partition_config is set, and tensor_parallel {config.tensor_parallel} brings its "
                "own; remove it"
            )
        merged["tensor_parallel"]["partition_config"] = {"use_default_specs": False, "layer_specs": layer_specs(family)}
        # DeepSpeed takes it for the batch of all processes, as if none of them saw the same.
        del merged["train_batch_size"]
    offload = merged["zero_optimization"].get("offload_optimizer") or {}
    if stage.ema is not None and offload.get("device") == "nvme":
        raise UsageError(
            f"ema {stage.ema:g} averages weights in memory, and deepspeed: offload_optimizer.device is nvme; remove one"
        )
    _check_offload(merged["zero_optimization"], config.zero)
    # The loop's optimizers are torch's own; ZeRO takes them only if it is told so.
    merged.setdefault("zero_allow_untested_optimizer", True)
    merged.setdefault("zero_force_ds_cpu_optimizer", False)
    merged.setdefault("steps_per_print", 10**9)
    return merged


# What may lie in the memory of the host or on a disk -> the ZeRO stages that move it there.
OFFLOAD = {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}


def _check_offload(section: dict[str, Any], zero: int) -> None:
    for name, stages in OFFLOAD.items():
        device = (section.get(name) or {}).get("device", "none")
        if device != "none" and zero not in stages:
            able = " or ".join(map(str, stages))
            raise UsageError(f"deepspeed: {name}.device is {device}, which zero {zero} does not do; use zero {able}")
        if device == "nvme" and not AsyncIOBuilder().is_compatible(verbose=False):
            raise UsageError(
                f"deepspeed: {name}.device is nvme, and DeepSpeed's async_io does not build here; install libaio-dev and g++, "
                "or offload to cpu"
            )


def micro_batch_size(stage: Stage, world_size: int) -> int:
    """Samples a rank holds at once; raises UsageError with the numbers where the batch does not divide."""
    micro = stage.micro_batch or max(1, stage.batch // world_size)
    share = world_size * micro
    if stage.batch % share:
        lower, upper = stage.batch // share * share, (stage.batch // share + 1) * share
        fits = f"{lower} or {upper}" if lower else str(upper)
        raise UsageError(
            f"batch {stage.batch} does not divide over {world_size} processes × micro_batch {micro} = {share}; "
            f"use batch {fits}"
        )
    return micro


def _load(given: dict[str, Any] | str) -> dict[str, Any]:
    if not isinstance(given, str):
        return json.loads(json.dumps(given))
    try:
        loaded = json.loads(Path(given).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"deepspeed: {given} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"deepspeed: {given} is not valid JSON: {error}") from None
    if not isinstance(loaded, dict):
        raise UsageError(f"deepspeed: {given} holds a {type(loaded).__name__}; DeepSpeed wants an object")
    return loaded


def _batches(stage: Stage, world_size: int) -> dict[str, Any]:
    micro = micro_batch_size(stage, world_size)
    return {
        "train_batch_size": stage.batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": stage.batch // (micro * world_size),
    }


def _precision(config: Config, given: dict[str, Any]) -> dict[str, Any]:
    """bf16 is autocast over fp32 weights, as fast on CPUs as bf16 weights and at home in every ZeRO stage.

    A `bf16` section of the user's own, enabled, means bf16 weights with fp32 masters; these, and fp16, are ZeRO's work.
    """
    section = given.get("bf16")
    asked = isinstance(section, dict) and section.get("enabled") in (True, AUTO)
    bf16_weights = config.precision == "bf16" and asked
    if (bf16_weights or config.precision == "fp16") and config.zero == 0:
        kind = "deepspeed: bf16" if bf16_weights else "precision fp16"
        raise UsageError(f"{kind} keeps masters of the weights, which zero {config.zero} does not; use zero 1, 2 or 3")
    sections: dict[str, Any] = {"bf16": {"enabled": bf16_weights}, "fp16": {"enabled": config.precision == "fp16"}}
    if config.precision == "bf16" and not bf16_weights:
        sections["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return sections


def clip_of(stage: Stage) -> float:
    """The largest norm of a gradient; 0: no limit.

    Under ZeRO, Muon's updates stand in the gradients' place before these are clipped: each matrix adds the norm of an
    orthogonal one, and a limit of 1 would shrink them all by as much.
    """
    return 0.0 if stage.optimizer == "muon" else stage.clip


def _rest(config: Config, stage: Stage) -> dict[str, Any]:
    muon = stage.optimizer == "muon"
    adamw = {} if muon else {"eps": EPS}
    # DeepSpeed's Muon wants whole gradients, which ZeRO-3 would scatter as it sums them.
    whole_gradients = {"reduce_scatter": False} if muon and config.zero == 3 else {}
    return {
        "gradient_clipping": clip_of(stage),
        "zero_optimization": {"stage": config.zero, **whole_gradients},
        "tensor_parallel": {"autotp_size": config.tensor_parallel},
        # What the loop's own does; filled in where the user writes a section with "auto", never added.
        "optimizer": {
            "type": "Muon" if muon else "AdamW",
            "params": {"lr": stage.lr, "weight_decay": stage.weight_decay, "betas": list(BETAS), **adamw},
        },
    }


def _check_optimizer(section: dict[str, Any]) -> None:
    for name in section.get("params", {}):
        if f"optimizer.params.{name}" not in NAMES:
            raise UsageError(f"deepspeed: optimizer.params.{name} is set, and the optimizers here have none; remove it")


ONLY_IF_GIVEN = ("optimizer",)
ALONE = {"autotp_size": 1}
NAMES = {
    "train_batch_size": "batch",
    "train_micro_batch_size_per_gpu": "micro_batch",
    "gradient_accumulation_steps": "batch / (processes × micro_batch)",
    "gradient_clipping": "clip",
    "zero_optimization.stage": "zero",
    "zero_optimization.reduce_scatter": "optimizer muon with zero 3",
    "tensor_parallel.autotp_size": "tensor_parallel",
    "bf16.enabled": "precision bf16",
    "fp16.enabled": "precision fp16",
    "torch_autocast.enabled": "precision bf16",
    "torch_autocast.dtype": "precision bf16",
    "optimizer.type": "optimizer",
    "optimizer.params.lr": "lr",
    "optimizer.params.weight_decay": "weight_decay",
    "optimizer.params.betas": "betas",
    "optimizer.params.eps": "eps",
}


def _fill(given: dict[str, Any], ours: dict[str, Any], stage: Stage, above: str) -> None:
    for key, value in ours.items():
        name = above + key
        if key not in given and (key in ONLY_IF_GIVEN or value == ALONE):
            continue
        if isinstance(value, dict):
            section = given.setdefault(key, {})
            if not isinstance(section, dict):
                raise UsageError(f"deepspeed: {name} is {section!r}; it should be an object")
            _fill(section, value, stage, name + ".")
        elif given.setdefault(key, value) == AUTO:
            given[key] = value
        elif given[key] != value:
            raise UsageError(
                f"deepspeed: {name} is {given[key]!r}, and {NAMES[name]} of the {stage.objective} stage is {value!r}; "
                f'change one, or write "auto" in its place'
            )


def _drop_auto(section: dict[str, Any]) -> None:
    for key in [key for key, value in section.items() if value == AUTO]:
        del section[key]
    for value in section.values():
        if isinstance(value, dict):
            _drop_auto(value)
