"""Token cross-entropy from hidden states: the head of any language model and the loss, a chunk of tokens at a time.

Knows how Hugging Face language models end: in what their own `forward` does with the last hidden states. Knows nothing of
objectives or batches. The logits of all tokens never exist together: forward and backward hold those of one chunk.

Shapes: T labelled tokens, C hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from vlm.errors import UsageError
from vlm.losses import ranks

# Logits that are held at once: 256 MiB in float32.
MOST_LOGITS = 2**26


class TokenLoss(NamedTuple):
    """Sum of -log softmax(logits)[label] over the labelled tokens, float32; and which of them, (T,) bool, are predicted right."""

    total: Tensor
    right: Tensor


class _States(BaseModelOutput):
    """Last hidden states and nothing beside them: no cache, no attentions, whatever a family's `forward` looks for."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Given(nn.Module):
    """Stands where the layers of a language model stand, and gives back the hidden states that it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["decoder"] = self  # OPT calls its `model.decoder`

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _States:
        return _States(last_hidden_state=inputs_embeds)


class Head:
    """What a language model's own `forward` does after its layers: last hidden states (T, C) -> logits (T, V).

    Bias, transform, scaling and soft-capping are the family's, and the modules are called as the family calls them: the
    hooks by which ZeRO-3 gathers a weight run, and weights tied or under LoRA are those of the model.
    """

    def __init__(self, language_model: PreTrainedModel) -> None:
        # A second object around the same parts: the language model itself stays as it is.
        self._ending: Any = copy.copy(language_model)
        self._ending.__dict__["_modules"] = language_model._modules | {language_model.base_model_prefix: _Given()}
        self._forward: Any = type(language_model).forward
        self._options = (
            {"output_router_logits": False} if hasattr(language_model.config, "output_router_logits") else {}
        )

    def __call__(self, hidden: Tensor) -> Tensor:
        """(T, C) -> (T, V)."""
        return self._forward(self._ending, inputs_embeds=hidden[None], **self._options).logits[0]


def check_head(language_model: PreTrainedModel) -> None:
    """Raise UsageError, by name, for a family whose logits are not what its head makes of the last hidden states."""
    family = language_model.config.model_type
    ids = torch.arange(4, device=language_model.device)[None]
    training = language_model.training
    language_model.eval()
    try:
        with torch.no_grad():
            expected = language_model(input_ids=ids).logits[0]
            found = Head(language_model)(language_model.base_model(input_ids=ids).last_hidden_state[0])
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"the head of language model family {family!r} cannot be called alone ({error})") from None
    finally:
        language_model.train(training)
    if expected.shape != found.shape or not torch.allclose(expected, found, rtol=1e-3, atol=1e-3):
        raise UsageError(f"language model family {family!r} makes its logits of more than its last hidden states")


def linear_cross_entropy(language_model: PreTrainedModel, hidden: Tensor, labels: Tensor) -> TokenLoss:
    """The loss of predicting `labels` (T,) from last hidden states (T, C); a collective call.

    Every chunk is recomputed in the backward pass, and adds its gradients to weights in their own dtype, under autocast in
    float32. All ranks run as many chunks, for under ZeRO-3 each gathers the head's weights. Where T is 0 the sum is 0,
    with its gradient connected.
    """
    head = Head(language_model)
    size = max(1, MOST_LOGITS // language_model.config.get_text_config().vocab_size)
    chunks = _most_on_a_rank(-(-len(labels) // size), hidden.device)
    if chunks == 1:
        return TokenLoss(*_chunk(head, hidden, labels))
    totals, rights = [], []
    for start in range(0, chunks * size, size):
        part = slice(start, start + size)
        total, right = checkpoint(_chunk, head, hidden[part], labels[part], use_reentrant=False)
        totals.append(total)
        rights.append(right)
    return TokenLoss(torch.stack(totals).sum(), torch.cat(rights))


def _chunk(head: Head, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    kind = hidden.device.type
    # Autocast would keep one bf16 copy of the head's weight for all chunks, and add up their gradients in bf16.
    with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False):
        logits = head(hidden)
    total = F.cross_entropy(logits.float(), labels, reduction="sum")
    # The first of the largest, as `argmax` finds it, at a quarter of its time in bf16 on CPUs.
    return total, logits.detach().max(-1).indices == labels


def _most_on_a_rank(chunks: int, device: torch.device) -> int:
    """The largest number of chunks that a rank has, at least one."""
    if ranks() == 1:
        return max(1, chunks)
    most = torch.tensor(max(1, chunks), device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)
