"""How adapters enter a language model whose code stays untouched: by forward pre-hooks on its layers.

The visual states travel as one keyword argument, `visual`, through the language model's own `**kwargs` into every layer. The
hook of a chosen layer takes it out, runs the adapter on the hidden states, and the layer goes on. Nothing is kept on
modules between calls. Knows the calling conventions of Hugging Face language models; knows nothing of pixels or losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlm.errors import UsageError


@dataclass(frozen=True)
class Visual:
    """What every layer is told about the pictures of a batch.

    keys_values: (B, 2, K, S, d) for each of the A adapters in order, keys and values over the S image tokens of a row.
    sees (B, L), bool: True where a text token has a picture before it.
    mask (B, 1, L, S), bool, or None where a row has one picture: which image tokens a text token may look at.
    router_logits: a list that every adapter with experts adds its router's logits (B·L, experts) to, in order; None: nobody asks.
    """

    keys_values: tuple[Tensor, ...]
    sees: Tensor
    mask: Tensor | None
    router_logits: list[Tensor] | None = None


@contextmanager
def family_faults(family: str) -> Iterator[None]:
    """Makes one UsageError that names the family of whatever transformers raises within, which is of every kind."""
    try:
        yield
    except Exception as error:
        # A strict dataclass says in its first line that a check failed, and in its cause what was wrong.
        cause = error.__cause__ or error
        said = "".join(str(cause).strip().splitlines()[:1]).rstrip(".:")
        raise UsageError(
            f"language model family {family!r} cannot be used: {type(cause).__name__}: {said}; choose another, or other sizes "
            "and options"
        ) from error


def decoder_layers(language_model: PreTrainedModel) -> nn.ModuleList:
    """The list of transformer layers: the outermost `ModuleList` as long as the configuration says the model is deep."""
    depth = language_model.config.get_text_config().num_hidden_layers
    for _, module in sorted(language_model.named_modules(), key=lambda item: item[0].count(".")):
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise UsageError(
        f"language model {language_model.config.model_type!r} has no list of {depth} layers to link; choose a plain "
        "decoder or encoder family (Llama, Qwen, GPT-2, BERT, …)"
    )


def attach(layers: nn.ModuleList, chosen: tuple[int, ...], fuse: Callable[[str, Tensor, Visual], Tensor]) -> None:
    """Give every layer a pre-hook that takes `visual` out of its keywords; `chosen` layers also run `fuse(key, hidden, visual)`."""
    for index, layer in enumerate(layers):
        key = str(index) if index in chosen else None
        layer.register_forward_pre_hook(partial(_enter_layer, fuse, key), with_kwargs=True)


def _enter_layer(
    fuse: Callable[[str, Tensor, Visual], Tensor],
    key: str | None,
    layer: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
) -> tuple[tuple, dict[str, Any]] | None:
    if "visual" not in kwargs:
        return None
    kwargs = dict(kwargs)
    visual = kwargs.pop("visual")
    if key is None or visual is None:
        return args, kwargs
    if args:
        return (fuse(key, args[0], visual), *args[1:]), kwargs
    kwargs["hidden_states"] = fuse(key, kwargs["hidden_states"], visual)
    return args, kwargs


def check_carries_keywords(language_model: PreTrainedModel) -> None:
    """Refuse, by name, a family whose layers never receive the keyword (Bloom, GPT-J, Falcon, MPT and Mamba drop it), and one
    that cannot read two tokens."""
    layers = decoder_layers(language_model)
    arrived: list[int] = []

    def listen(
        index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        if "visual" not in kwargs:
            return None
        arrived.append(index)
        return args, {name: value for name, value in kwargs.items() if name != "visual"}

    hooks = [
        layer.register_forward_pre_hook(partial(listen, index), with_kwargs=True) for index, layer in enumerate(layers)
    ]
    family = language_model.config.model_type
    probe_ids = torch.zeros((1, 2), dtype=torch.long, device=language_model.device)
    try:
        with torch.no_grad(), family_faults(family):
            language_model(input_ids=probe_ids, visual=None)
    finally:
        for hook in hooks:
            hook.remove()
    if arrived != list(range(len(layers))):
        raise UsageError(
            f"language model family {family!r} passes keywords to {len(arrived)} of its {len(layers)} layers, so adapters "
            "cannot be linked; choose a family that passes them on (Llama, Mistral, Qwen, Gemma, GPT-2, OPT, BERT, …)"
        )
