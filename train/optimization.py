"""What trains, by which optimizer, and how fast at which moment.

Knows parameters by their names and shapes. Knows nothing of batches, losses or the engine that takes the steps.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from vlm.errors import UsageError
from vlm.lora import TOWERS, add_lora, remove_lora
from vlm.model import VLMModel

from .config_stage import Stage
from .objectives import OBJECTIVES, Objective

BETAS, EPS = (0.9, 0.95), 1e-8
DECAY = 0.2  # share of a stage in which schedule wsd goes down
# Tables that are looked up or added, not multiplied with: they are no matrices, whatever their shape.
TABLES = (
    "pos_embed",
    "cls_token",
    "reg_token",
    "class_embedding",
    "positional_embedding",
    "image_positions",
    "query",
    "latents",
)


def check_stages(stages: Sequence[Stage], model: VLMModel, first: int) -> None:
    """Raise UsageError for a stage, from `first` on, of which a pattern or a LoRA target matches nothing.

    Every stage is tried on the model, which keeps its weights: what fails after days should fail before them.
    """
    for number, stage in enumerate(stages[first:], first):
        try:
            if stage.lora is not None:
                with torch.random.fork_rng(devices=[]):
                    add_lora(model, **stage.lora.model_dump())
            choose_trainable(OBJECTIVES[stage.objective](model, stage), stage)
        except UsageError as error:
            raise UsageError(f"stages.{number}: {error}") from None
        finally:
            remove_lora(model)


def choose_trainable(objective: Objective, stage: Stage) -> None:
    """Set `requires_grad` of every parameter: those that the objective reads, `train` names and `freeze` does not.

    With LoRA, of its towers only the updates train. Raises UsageError for a pattern that matches nothing, for one of `rates`
    that matches nothing that trains, if nothing is left to train, and if no update of a tower with LoRA is.
    """
    parameters = dict(objective.model.named_parameters())
    for field in ("train", "freeze"):
        for pattern in getattr(stage, field):
            if not any(_matches(name, pattern) for name in parameters):
                parts = sorted({name.partition(".")[0] for name in parameters})
                raise UsageError(
                    f"{field} pattern {pattern!r} matches none of {len(parameters)} parameters; their names begin with "
                    f"{', '.join(parts)}"
                )
    for name, parameter in parameters.items():
        parameter.requires_grad_(shall_train(name, objective, stage))
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UsageError(
            f"train {stage.train} and freeze {stage.freeze} leave objective {stage.objective} nothing to train, of "
            f"{len(parameters)} parameters; it reads those that begin with {', '.join(objective.reads())}"
        )
    _check_lora(parameters, objective, stage)
    _check_rates({name for name, parameter in parameters.items() if parameter.requires_grad}, stage)


def shall_train(name: str, objective: Objective, stage: Stage) -> bool:
    """Whether a stage trains the parameter of this name."""
    towers = tuple(f"{TOWERS[tower][0]}." for tower in stage.lora.towers) if stage.lora is not None else ()
    beside_lora = name.startswith(towers) and "lora_" not in name
    wanted = any(_matches(name, pattern) for pattern in stage.train)
    frozen = beside_lora or any(_matches(name, pattern) for pattern in stage.freeze)
    return wanted and not frozen and name.startswith(objective.reads())


def _check_lora(parameters: dict[str, nn.Parameter], objective: Objective, stage: Stage) -> None:
    """Raises UsageError for a tower whose LoRA would learn nothing."""
    for tower in stage.lora.towers if stage.lora is not None else ():
        updates = [name for name in parameters if name.startswith(f"{TOWERS[tower][0]}.") and "lora_" in name]
        if not any(parameters[name].requires_grad for name in updates):
            raise UsageError(
                f"train {stage.train} and freeze {stage.freeze} leave objective {stage.objective} none of the {len(updates)} "
                f"lora parameters of tower {tower} to train; it reads those that begin with {', '.join(objective.reads())}, "
                "and the base stands still by itself under lora: leave it out of freeze and in train, or the tower out of "
                "lora.towers"
            )


def _check_rates(trained: set[str], stage: Stage) -> None:
    """Raises UsageError for a pattern of `rates` that decides for none of the parameters that train."""
    deciding = {_deciding(name, stage) for name in trained}
    for pattern in stage.rates:
        if pattern in deciding:
            continue
        matched = [name for name in sorted(trained) if _matches(name, pattern)]
        if not matched:
            raise UsageError(
                f"rates pattern {pattern!r} matches none of {len(trained)} parameters that train; their names begin with "
                f"{', '.join(sorted({name.partition('.')[0] for name in trained}))}"
            )
        raise UsageError(
            f"rates pattern {pattern!r} comes too late: all {len(matched)} parameters that it matches are taken by the "
            f"patterns before it, such as {_deciding(matched[0], stage)!r}; put it first"
        )


def _deciding(name: str, stage: Stage) -> str | None:
    return next((pattern for pattern in stage.rates if _matches(name, pattern)), None)


def factor_of(name: str, stage: Stage) -> float:
    """What a parameter's learning rate is of the stage's: by the first of the stage's `rates` that matches its name, else 1."""
    pattern = _deciding(name, stage)
    return 1.0 if pattern is None else stage.rates[pattern]


def _matches(name: str, pattern: str) -> bool:
    """A pattern, or the beginning of a name up to a dot: `vision` is `vision.*`."""
    return fnmatchcase(name, pattern) or name.startswith(pattern + ".")


def make_optimizer(model: VLMModel, stage: Stage) -> torch.optim.Optimizer:
    """AdamW, or Muon for the hidden matrices and AdamW for the rest, over what trains.

    Weight decay is for matrices alone: not for norms, biases, gates, embeddings. `scale` in a group multiplies its
    learning rate: the stage's `rates`, and what Muon's updates take.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = getattr(model.get_output_embeddings(), "weight", None)
    groups: dict[tuple, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.ndim >= 2 and id(parameter) not in embeddings and name.rpartition(".")[2] not in TABLES
        by_muon = stage.optimizer == "muon" and matrix and parameter.ndim == 2 and parameter is not head
        shape = tuple(parameter.shape) if by_muon else None
        groups[matrix, shape, factor_of(name, stage)].append(parameter)
    listed = [
        _group(matrix, shape, factor, parameters, stage) for (matrix, shape, factor), parameters in groups.items()
    ]
    if stage.optimizer == "muon":
        return _muon(listed)
    return torch.optim.AdamW(listed, lr=stage.lr, betas=BETAS, eps=EPS, fused=True)


def _group(
    matrix: bool, shape: tuple[int, int] | None, factor: float, parameters: list[nn.Parameter], stage: Stage
) -> dict[str, Any]:
    decay = stage.weight_decay if matrix else 0.0
    group: dict[str, Any] = {"params": parameters, "lr": stage.lr, "weight_decay": decay, "scale": factor}
    if shape is not None:
        # An orthogonal update, brought to the size of AdamW's, takes AdamW's learning rate and decay (Moonlight, Liu et
        # al. 2025, equation 4). DeepSpeed's Muon has put in √max(1, rows / columns) already.
        rows, columns = shape
        group["scale"] *= 0.2 * math.sqrt(max(rows, columns)) / math.sqrt(max(1.0, rows / columns))
    if stage.optimizer == "muon":
        group["use_muon"] = shape is not None
    return group


def _muon(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """DeepSpeed's Muon, which alone knows how to orthogonalise a matrix that ZeRO has flattened and split."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    for group in groups:
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]
        if group["use_muon"]:
            # Five steps in bf16 on the matrix itself; DeepSpeed's default, on its Gram matrix, is fp16 or fp32 work.
            group["ns_method"] = "standard"
        else:
            group["betas"] = BETAS
    return MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"fused": True})


def state_bytes(optimizer: torch.optim.Optimizer, masters: bool) -> int:
    """Bytes of float32 that `optimizer` keeps over all ranks: two moments, or Muon's one; and weights where those that
    train have `masters`."""
    numbers = 0
    for group in optimizer.param_groups:
        kept = (1 if group.get("use_muon") else 2) + masters
        numbers += kept * sum(parameter.numel() for parameter in group["params"])
    return 4 * numbers


def set_rates(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def rate(stage: Stage, share: float) -> float:
    """The learning rate when `share` (0 to 1) of the stage is done: a linear climb, then the schedule, to 0 at the end.

    wsd, warmup–stable–decay: MiniCPM (Hu et al. 2024), section 4, with the linear decay of Hägele et al. 2024.
    """
    if share < stage.warmup:
        return stage.lr * share / stage.warmup
    rest = (share - stage.warmup) / max(1e-9, 1.0 - stage.warmup)
    if stage.schedule == "cosine":
        return stage.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, rest)))
    if stage.schedule == "linear":
        return stage.lr * max(0.0, 1.0 - rest)
    if stage.schedule == "wsd":
        decay = min(DECAY, max(1e-9, 1.0 - stage.warmup))
        return stage.lr * min(1.0, max(0.0, 1.0 - share) / decay)
    return stage.lr
