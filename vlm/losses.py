"""What training minimises: contrastive losses over all ranks, which tokens are predicted, and how text is masked for MLM.

Knows tensors and the process group. Knows nothing of models, batches on disk, or optimizers. Losses are sums over what
this rank holds, in float32; who averages them, and over what, is the caller's to say. Token cross-entropy has a file of
its own, `linear_cross_entropy.py`.

Shapes: B rows, L tokens, V vocabulary, T labelled tokens, n pairs of this rank, N pairs of all ranks, E embedding size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributed as dist

IGNORED = -100

# Tokens


def labelled(states: Tensor, labels: Tensor, shift: bool) -> tuple[Tensor, Tensor]:
    """States (T, …) from which the labelled tokens are predicted, and labels (T,), of states (B, L, …) and labels (B, L).

    labels are aligned with the input, -100 where nothing is to be predicted. shift: a token is predicted from the
    position before it, as decoders do (for MLM too: LLM2Vec, BehnamGhader et al. 2024); else in its own place.
    """
    if shift:
        states, labels = states[:, :-1], labels[:, 1:]
    chosen = labels != IGNORED
    return states[chosen], labels[chosen]


def count_targets(labels: Tensor, shift: bool) -> int:
    """How many tokens `labelled` would find."""
    return int((labels[:, 1:] if shift else labels).ne(IGNORED).sum())


def documents_right(right: Tensor, labels: Tensor, document_ids: Tensor, documents: int) -> Tensor:
    """(B, documents) bool: whether every labelled token of document 1, 2, … of a row is predicted right.

    right (T,), bool: of each labelled token in the order of `labelled`, shifted. labels, document_ids: (B, L).
    """
    labels, document_ids = labels[:, 1:], document_ids[:, 1:]
    faults = torch.zeros(len(labels), documents + 1, dtype=torch.long, device=labels.device)
    wrong = torch.zeros_like(labels).masked_scatter_(labels != IGNORED, (~right).long())
    return faults.scatter_add_(1, document_ids, wrong)[:, 1:] == 0


# Masked language modelling


def mask_tokens(
    ids: Tensor, maskable: Tensor, share: float, mask_id: int, ordinary: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Corrupt tokens for MLM (BERT, Devlin et al. 2019, section 3.1): returns ids and labels of the same shape.

    Each token where `maskable` is chosen with probability `share`; of the chosen, 80 % become `mask_id`, 10 % one of
    the `ordinary` token ids (K,), 10 % stay. Labels hold the chosen tokens, -100 elsewhere.
    """
    draws = torch.rand((2, *ids.shape), generator=generator)
    chosen = maskable & (draws[0] < share)
    randoms = ordinary[torch.randint(len(ordinary), ids.shape, generator=generator)]
    corrupted = torch.where(chosen & (draws[1] < 0.8), mask_id, ids)
    corrupted = torch.where(chosen & (draws[1] >= 0.9), randoms, corrupted)
    return corrupted, torch.where(chosen, ids, IGNORED)


# Pictures against texts, over all ranks


class _AllGather(torch.autograd.Function):
    """(rows, E) of each rank, equally many -> (ranks · rows, E). Every rank's loss reaches back into every rank's rows."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.rows, ctx.group = len(own), group
        everything = own.new_empty(ranks(group) * len(own), *own.shape[1:])
        dist.all_gather_into_tensor(everything, own.contiguous(), group=group)
        return everything

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group) * ctx.rows :][: ctx.rows], None


def ranks(group: dist.ProcessGroup | None = None) -> int:
    """How many processes train together; of a group, where one is given."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def gather_rows(own: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, int]:
    """Rows (n, E) of this rank -> the rows of all ranks (N, E), in rank order, and the number of the first own row.

    Ranks may hold different numbers of rows. The gradient is exact: the sum over ranks of what each loss asks for.
    group: the ranks that hold rows of their own; None: all.
    """
    if ranks(group) == 1:
        return own, 0
    counts = torch.zeros(ranks(group), dtype=torch.long, device=own.device)
    counts[dist.get_rank(group)] = len(own)
    dist.all_reduce(counts, group=group)
    sizes = counts.tolist()
    longest = max(sizes)
    if longest == 0:
        return own, 0
    padded = F.pad(own, (0, 0, 0, longest - len(own)))
    everything = _AllGather.apply(padded, group)
    rows = torch.cat([everything[rank * longest :][:size] for rank, size in enumerate(sizes)])
    return rows, sum(sizes[: dist.get_rank(group)])


def infonce(
    images: Tensor, texts: Tensor, scale: Tensor, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor, float]:
    """Symmetric InfoNCE (CLIP, Radford et al. 2021, figure 3): each picture finds its text among all, and the reverse.

    images, texts: (n, E), unit length, row by row a pair; scale: the inverse temperature; group: the ranks, None for all.
    Returns the loss summed over own pairs, how many own pictures rank their own text first, and the mean number
    of pairs on a rank: the mean over ranks of loss / that number is the mean over the N pairs.
    """
    all_images, first = gather_rows(images, group)
    all_texts, _ = gather_rows(texts, group)
    own = torch.arange(first, first + len(images), device=images.device)
    by_image = scale * images @ all_texts.T  # (n, N)
    by_text = scale * texts @ all_images.T
    loss = F.cross_entropy(by_image, own, reduction="sum") + F.cross_entropy(by_text, own, reduction="sum")
    return loss / 2, _own_first(by_image, own), len(all_texts) / ranks(group)


def siglip(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor, float]:
    """Pairwise sigmoid loss (SigLIP, Zhai et al. 2023, equation 1): every picture with every text is a yes or a no.

    Arguments and results as in `infonce`; the pairs of an own picture with all texts are summed.
    """
    all_texts, first = gather_rows(texts, group)
    own = torch.arange(first, first + len(images), device=images.device)
    logits = scale * images @ all_texts.T + bias  # (n, N)
    signs = torch.full_like(logits, -1.0).scatter_(1, own[:, None], 1.0)
    return -F.logsigmoid(signs * logits).sum(), _own_first(logits, own), len(all_texts) / ranks(group)


def _own_first(logits: Tensor, own: Tensor) -> Tensor:
    """How many rows of (n, N) have their largest value in column `own`; of a step without pairs, none."""
    if logits.numel() == 0:
        return torch.zeros((), dtype=torch.long, device=logits.device)
    return (logits.argmax(1) == own).sum()
