"""Mixtures of experts: the loss that keeps their routers even, and how even they are.

Knows router logits, and the names that Hugging Face configurations have for them. Knows nothing of models or objectives.

Shapes: B rows, L tokens, E experts, k of them for a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func


def balances(text_config: PreTrainedConfig) -> bool:
    """Whether a language model's routers are kept even by a loss."""
    return bool(getattr(text_config, "router_aux_loss_coef", 0.0))


def router_loss(chosen: int, router_logits: Sequence[Tensor], real: Tensor) -> tuple[Tensor, Tensor]:
    """The load-balancing loss (Switch Transformer, Fedus et al. 2021, equations 4 to 6), before its weight.

    chosen: k. router_logits: (B·L, E) of each layer. real: (B, L), the tokens that count; without any the loss is 0.
    Also returns the share of tokens that the busiest expert of a layer is given, the mean over layers: k / E where all are
    even, 1 where one has every token.
    """
    experts = router_logits[0].shape[-1]
    if not real.any():
        return 0.0 * torch.stack([logits.sum() for logits in router_logits]).sum(), torch.zeros((), device=real.device)
    loss = load_balancing_loss_func(tuple(router_logits), experts, chosen, real.long())
    counted = real.flatten()
    busiest = []
    for logits in router_logits:
        given = logits.detach()[counted].topk(chosen, dim=-1).indices
        busiest.append(torch.bincount(given.flatten(), minlength=experts).max())
    return loss, torch.stack(busiest).float().mean() / counted.sum().clamp(min=1)
