"""`vlm bench train --against zero`: what a rank holds under each ZeRO stage, alone and as one of two, counted.

Knows a small language model, the clm objective and where DeepSpeed keeps its partitions. Knows nothing of speed, nor of what
passes through: activations, and the buffers of a fixed size by which gradients and weights travel.

ZeRO-2 cuts a flat row of all gradients, and a rank holds the whole of a tensor that the cut goes through: the promise is one
to models of many layers, none of which is a large part of the whole. ZeRO-1 promises nothing of gradients, and lets go of
those that it does not need as soon as they are summed.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor
from torch import distributed as dist
from transformers import AutoConfig

from vlm.benchmark import Row
from vlm.configuration import VLMConfig
from vlm.errors import RunError
from vlm.model import VLMModel

from .config import Config
from .deepspeed_config import deepspeed_config
from .objectives import OBJECTIVES, Plan
from .optimization import choose_trainable, make_optimizer
from .ranks import is_main, join, joined

RANKS = 2
STAGES = (0, 1, 2, 3)
PARTS = ("parameters", "gradients", "optimizer")
# ZeRO (Rajbhandari et al. 2020), section 5: the parts that each stage splits over the ranks.
SPLIT = {0: (), 1: ("optimizer",), 2: ("gradients", "optimizer"), 3: PARTS}
# Numbers below which ZeRO-3 keeps a parameter whole on every rank: norms alone.
WHOLE = 1000


def rows() -> list[Row]:
    """MiB of each part that one of two ranks holds, beside what its ZeRO stage promises: 1/N of what one rank alone holds."""
    alone, (first, second) = measured(1)[0], measured(RANKS)
    found = []
    for stage in STAGES:
        for part in PARTS:
            share = RANKS if part in SPLIT[stage] else 1
            before, after = alone[stage][part], max(first[stage][part], second[stage][part])
            conditions = (
                f"the fuller of {RANKS} ranks, fp32, AdamW, after the backward pass; peer: promised, 1/{share} of the "
                f"{before / 2**20:,.1f} MiB of one rank"
            )
            target = "0.9 to 1.1" if share > 1 else "≤ 1.1"
            found.append(Row(f"zero {stage}: {part}", after / 2**20, before / share / 2**20, "MiB", conditions, target))
    return found


def measured(ranks: int) -> list[list[dict[str, int]]]:
    """Bytes by rank, ZeRO stage and part, from so many fresh processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "vlm.train.bench_zero"]
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
    if done.returncode:
        raise RunError(f"{ranks} processes that count their memory failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def count(zero: int) -> dict[str, int]:
    """Bytes of each part on this rank, between the backward pass of a second step and its update; a collective call."""
    settings = {"stage3_param_persistence_threshold": WHOLE}
    config = Config.model_validate(
        {
            "model": {"path": "none"},
            "data": {"train": "none"},
            "stages": [{"objective": "clm", "steps": 2, "batch": dist.get_world_size()}],
            "precision": "fp32",
            "zero": zero,
            "deepspeed": {"zero_optimization": settings},
        }
    )
    (stage,) = config.stages
    torch.manual_seed(0)
    objective = OBJECTIVES["clm"](deep_model(), stage).train()
    choose_trainable(objective, stage)
    ours = deepspeed_config(config, stage, dist.get_world_size())
    engine, *_ = deepspeed.initialize(model=objective, optimizer=make_optimizer(objective.model, stage), config=ours)
    ids = torch.randint(3, 512, (1, 64), generator=torch.Generator().manual_seed(0)).to(engine.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    found: dict[str, int] = {}
    for _ in range(2):
        loss, _ = engine(batch, Plan(float(ids.numel())))
        engine.backward(loss)
        found = held(engine)
        engine.step()
    engine.destroy()
    return found


def deep_model() -> VLMModel:
    """A language model of many small layers, with as little of a vision tower as there can be."""
    text = AutoConfig.for_model(
        "qwen3",
        vocab_size=512,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
    )
    tower = {"patch_size": 16, "embed_dim": 64, "depth": 1, "num_heads": 1}
    vision = {"name": "timm:vit_tiny_patch16_224", "image_size": (32, 32), "kwargs": tower}
    return VLMModel(VLMConfig(vision=vision, text_config=text, adapter={"every": 12}, image_token_id=3))


def held(engine: DeepSpeedEngine) -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer (its copy of the weights and its moments) in this rank's memory."""
    parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    optimizer: Any = engine.optimizer
    weights = _storages(
        value for parameter in parameters for value in (parameter, getattr(parameter, "ds_tensor", None))
    )
    gradients = _storages(_gradients(parameters, optimizer))
    inner = optimizer.optimizer if engine.zero_optimization() else optimizer
    copies = getattr(
        optimizer, "single_partition_of_fp32_groups", getattr(optimizer, "fp32_partitioned_groups_flat", [])
    )
    moments = [value for state in inner.state.values() for value in state.values()]
    states = _storages([*copies, *moments])
    return {
        "parameters": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "optimizer": sum(size for place, size in states.items() if place not in weights),
    }


def _gradients(parameters: list[torch.nn.Parameter], optimizer: Any) -> Iterator[Any]:
    for parameter in parameters:
        yield parameter.grad
        yield getattr(parameter, "grad_accum", None)
    for part in getattr(optimizer, "averaged_gradients", {}).values():
        yield from part if isinstance(part, list) else [part]
    yield getattr(optimizer, "grad_partitions_flat_buffer", None)


def _storages(values: Iterable[Any]) -> dict[int, int]:
    """Address -> bytes of the memory behind tensors, each piece once."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    return {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors}


def main() -> None:
    """One rank: count every stage; the main one prints what all have counted."""
    gc.freeze()  # ZeRO-3 collects what is garbage at each start
    join()
    told = joined([[count(stage) for stage in STAGES]])
    if is_main():
        print(json.dumps(told))


if __name__ == "__main__":
    main()
