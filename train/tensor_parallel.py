"""Tensor parallelism: neighbouring ranks that hold one language model and its adapters together, a share of the heads each.

Knows which linear layers DeepSpeed's AutoTP shall cut, and in which language model families the rest of the code does not mind.
Knows nothing of batches, losses or steps. The vision tower, embeddings, the head, norms and experts stay whole on every rank.

A layer cut by columns (Megatron-LM, Shoeybi et al. 2019, section 3) makes a share of the heads or inner features; one cut by
rows takes such a share and adds up over the ranks. What lies between is computed once, in shares.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META
from deepspeed.utils import groups
from torch import Tensor, nn
from torch import distributed as dist

from vlm.errors import UsageError
from vlm.model import VLMModel
from vlm.tensor_parallel import check_sizes

from .config import Config
from .ranks import copies

LLAMA_LIKE = ("(q|k|v)_proj", "(gate|up)_proj"), ("o_proj", "down_proj")
OPT_LIKE = ("(q|k|v)_proj", "fc1"), ("out_proj", "fc2")
BERT_LIKE = (r"self\.(query|key|value)", r"intermediate\.dense"), (r"output\.dense",)
# Family -> names of the layers that are cut by columns, and by rows. Others compute with sizes of their configuration, fuse what
# would have to be cut apart, or normalise over all heads.
FAMILIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text"), LLAMA_LIKE),
    **dict.fromkeys(("smollm3", "granite", "stablelm"), LLAMA_LIKE),
    **dict.fromkeys(("opt", "xglm"), OPT_LIKE),
    **dict.fromkeys(("bert", "roberta"), BERT_LIKE),
    "gpt_neox": (("query_key_value", "dense_h_to_4h"), (r"attention\.dense", "dense_4h_to_h")),
}


def layer_specs(family: str) -> list[dict[str, Any]]:
    """AutoTP's specification for a model of this family, by the names that parameters have in an objective."""
    columns, rows = FAMILIES[family]
    text, adapters = r"^model\.language_model\..*\blayers?\..*\.", r"^model\.adapters\..*\."
    # A norm of each head is whole on every rank, and each has the gradient of its own heads.
    norms = {"partition_type": "skip", "grad_allreduce": True}
    return [
        {"patterns": [rf"{text}({'|'.join(columns)})\.weight$"], "partition_type": "column"},
        {"patterns": [rf"{text}({'|'.join(rows)})\.weight$"], "partition_type": "row"},
        {"patterns": [rf"{adapters}(q_proj|k_proj|v_proj|up_proj)\.weight$"], "partition_type": "column"},
        {"patterns": [rf"{adapters}(o_proj|down_proj)\.weight$"], "partition_type": "row"},
        {"patterns": [rf"{text}(q|k)_norm\.weight$", rf"{adapters}(q|k)_norm\.weight$"], **norms},
    ]


def check_settings(config: Config) -> None:
    """Raise UsageError for what cannot be done with layers that are cut up."""
    together = f"tensor_parallel {config.tensor_parallel}"
    if config.tensor_parallel == 1:
        return
    if config.zero == 3:
        raise UsageError(f"{together} works with zero 0, 1 or 2, and zero is {config.zero}; change one")
    if config.model.quantize is not None:
        scheme = config.model.quantize
        raise UsageError(f"model.quantize {scheme} needs whole matrices, which {together} cuts up; change one")
    if config.compile:
        raise UsageError(f"{together} runs uncompiled, and compile is on; change one")
    for number, stage in enumerate(config.stages):
        if stage.lora is not None or stage.optimizer == "muon":
            what = f"lora {{r: {stage.lora.r}}}" if stage.lora is not None else "optimizer muon"
            raise UsageError(f"{what} of stages.{number} needs whole matrices, which {together} cuts up; change one")


def check_model(model: VLMModel, size: int) -> None:
    """Raise UsageError for a family that cannot be cut, and for heads or features that `size` ranks cannot share evenly."""
    if size == 1:
        return
    text = model.config.text_config.get_text_config()
    if text.model_type not in FAMILIES:
        raise UsageError(
            f"language model family {text.model_type!r} does not work with tensor_parallel {size}; use tensor_parallel 1, or "
            f"one of {', '.join(sorted(FAMILIES))}"
        )
    check_sizes(model.config, size)


def is_cut(parameter: nn.Parameter) -> bool:
    """Whether this rank holds a share of it."""
    return _cut_dimension(parameter) is not None


def is_counted(parameter: nn.Parameter) -> bool:
    """Whether this rank counts it in a sum over the ranks that hold a model together: its shares, and on the first of them
    what all of them hold whole."""
    return copies() == 1 or is_cut(parameter) or groups.get_tensor_model_parallel_rank() == 0


def whole(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """`value`, which has the shape of this rank's share of `parameter`, put together from all shares; a collective call."""
    dimension = _cut_dimension(parameter)
    if dimension is None:
        return value
    shares = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(copies())]
    dist.all_gather(shares, value.detach().contiguous(), group=groups.get_tensor_model_parallel_group())
    return torch.cat(shares, dim=dimension)


def norm_over_shares(gradients: list[tuple[nn.Parameter, Tensor]]) -> float:
    """The norm of whole gradients, of which each rank gives those that it holds; a collective call."""
    own = [gradient for parameter, gradient in gradients if is_counted(parameter)]
    norm = torch.nn.utils.get_total_norm(own)
    if copies() == 1:
        return float(norm)
    square = norm.double().square()
    dist.all_reduce(square, group=groups.get_tensor_model_parallel_group())
    return float(square.sqrt())


def _cut_dimension(parameter: nn.Parameter) -> int | None:
    """The dimension along which ranks share a parameter; None for one that each of them has whole."""
    told = getattr(parameter, DS_AUTOTP_UC_META, None)
    return None if told is None or told["replicated"] else told["partition_dim"]
