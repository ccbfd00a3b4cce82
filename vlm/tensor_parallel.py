"""Tensor parallelism: which layers of a composite several processes cut up between them, and by what rule.

Knows configurations, layer names and transformers' styles of cutting. Knows nothing of processes, files or requests.

A layer cut by columns (Megatron-LM, Shoeybi et al. 2019, section 3) makes a share of the heads or inner features; one cut by
rows takes such a share and adds up over the processes. The cutting itself, at loading and in the forward pass, is
transformers': most families come with a plan there, which the adapters' layers join. The vocabulary is cut too, in the
embedding and in the head, whose shares are gathered: so every process has the same logits, bit for bit, for each of them
was computed by one process and copied. Whole everywhere are the vision tower, norms, routers and the contrastive space.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers.distributed import DistributedConfig

from vlm.configuration import VLMConfig
from vlm.errors import UsageError

OLDEST = (5, 22)  # version of transformers, that cuts a vocabulary which the processes do not divide
# Layers that compute with sizes of their configuration: projections are cut and gathered, and attention is computed whole.
GATHERED = {f"self_attn.{name}_proj": "colwise_gather_output" for name in "qkv"}
FC = {"self_attn.out_proj": "rowwise_split_input", "fc1": "colwise", "fc2": "rowwise"}
GATED = {"self_attn.o_proj": "rowwise_split_input", "mlp.gate_proj": "colwise", "mlp.up_proj": "colwise"}
# Family -> what holds its layers, and how they are cut, where transformers has no plan.
FAMILIES: dict[str, tuple[str, dict[str, str]]] = {
    "opt": ("model.decoder", GATHERED | FC),
    "xglm": ("model", GATHERED | FC),
    "stablelm": ("model", GATHERED | GATED | {"mlp.down_proj": "rowwise"}),
}
ATTENTION = ("q_proj", "qkv_proj", "query_key_value")


def plan(config: VLMConfig) -> dict[str, str]:
    """Layer name, with * for a number, -> transformers' style; for what the family's own plan there leaves open."""
    adapter, text = config.adapter_config, config.text_config.get_text_config()  # type: ignore[union-attr]
    attention = {f"attention.{name}_proj": "colwise" for name in "qkv"} | {"attention.o_proj": "rowwise"}
    branch = "feed_forward.experts.*" if adapter.experts else "feed_forward"
    forward = {f"{branch}.up_proj": "colwise", f"{branch}.down_proj": "rowwise"} if adapter.feed_forward else {}
    cut = {f"adapters.*.{name}": style for name, style in (attention | forward).items()}
    if text.model_type in FAMILIES:
        holder, layers = FAMILIES[text.model_type]
        cut |= {f"language_model.{holder}.layers.*.{name}": style for name, style in layers.items()}
        cut[f"language_model.{holder}.embed_tokens"] = "embedding_rowwise"
        cut["language_model.lm_head"] = "colwise_gather_output"
    return cut


def check(config: VLMConfig, size: int) -> None:
    """Raise UsageError for a model that `size` processes cannot hold together: by its family, by weights that are quantized, by
    heads or features that they cannot share evenly."""
    text = config.text_config.get_text_config()  # type: ignore[union-attr]
    own = getattr(text, "base_model_tp_plan", None) or {}
    if config.reading == "masked" or not own and text.model_type not in FAMILIES:
        raise UsageError(
            f"language model family {text.model_type!r} cannot be cut for tensor_parallel {size}; load it whole, or use a "
            f"decoder family that can: Llama, Mistral, Mixtral, Qwen, Gemma, Phi-3, OLMo, GPT-NeoX, {', '.join(FAMILIES)}, …"
        )
    if config.quantization is not None:
        raise UsageError(
            f"the model is quantized to {config.quantization['scheme']} and tensor_parallel is {size}; cut the full-precision "
            "one, or load this one whole"
        )
    if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UsageError(
            f"tensor_parallel {size} needs transformers {oldest} and {transformers.__version__} is installed; "
            f"pip install -U 'transformers>={oldest}'"
        )
    shares_heads = any(style == "colwise" and name.endswith(ATTENTION) for name, style in own.items())
    check_sizes(config, size, heads=shares_heads, experts=True)


def check_sizes(config: VLMConfig, size: int, *, heads: bool = True, experts: bool = False) -> None:
    """Raise UsageError for heads or inner features that `size` processes cannot share evenly.

    heads, experts: whether those of the language model are shared at all.
    """
    adapter, text = config.adapter_config, config.text_config.get_text_config()  # type: ignore[union-attr]
    text_heads = text.num_attention_heads
    counted: dict[str, int] = {}
    if heads:
        counted["heads of the language model"] = text_heads
        counted["key/value heads of the language model"] = getattr(text, "num_key_value_heads", None) or text_heads
    for name in ("intermediate_size", "ffn_dim", *(["moe_intermediate_size"] if experts else [])):
        if getattr(text, name, None):
            counted[f"{name} of the language model"] = getattr(text, name)
    counted["heads of the adapters"] = adapter.heads or text_heads
    counted["key/value heads of the adapters"] = adapter.kv_heads or counted["heads of the adapters"]
    if adapter.feed_forward:
        counted["feed-forward features of the adapters"] = int(adapter.feed_forward * text.hidden_size)
    for name, count in counted.items():
        if count % size:
            raise UsageError(f"tensor_parallel {size} does not divide the {count} {name}; use a divisor of {count}")


def settings(config: VLMConfig, size: int) -> dict[str, Any]:
    """What `from_pretrained` is told so that each of `size` processes of a group reads its own part alone."""
    return {"distributed_config": DistributedConfig(tp_size=size, tp_plan=plan(config))}
