"""Image–text matching: does this text go with this picture? With hard negatives (ALBEF, Li et al. 2021, section 3.2; BLIP, Li et
al. 2022).

Each pair of a micro-batch is read three times by the language model through its adapters: as it is, its picture with a wrong
text, its text with a wrong picture. The wrong ones are drawn from the micro-batch, each in proportion to the softmax of the
contrastive likeness: what is easily confused comes often. Every rank draws from its own pairs, so that on more ranks a pair
meets other negatives than on one.

Knows embeddings, the joint objective's batches and the head of the model. Knows nothing of how embeddings are made, of ranks
or of steps.

Shapes: p pairs of a micro-batch, q of them with a negative.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.model import VLMModel

from .contrast import Pairs

Batch = dict[str, Any]


class Negatives(NamedTuple):
    """The pairs (q,) that have a negative, and for each the pair that lends a wrong text, and that which lends a wrong picture."""

    chosen: Tensor
    texts: Tensor
    pictures: Tensor


def differ(batch: Batch) -> Tensor:
    """(p, p), bool: whether two pairs have different texts; then each is a negative of the other."""
    count = len(batch["pair_images"])
    real = torch.where(batch["pair_attention_mask"] > 0, batch["pair_input_ids"], -1)[:count]
    return (real[:, None] != real[None]).any(dim=-1)


def pairs_with_negatives(batch: Batch) -> int:
    """q: how many pairs of a batch have another one whose text differs."""
    return int(differ(batch).any(dim=1).sum())


def draw(pairs: Pairs, batch: Batch, training: bool) -> Negatives:
    """A picture draws among the texts j that differ from its own with softmax_j(scale · cosine), a text among their pictures.

    training: from the global generator; else always the same.
    """
    differing = differ(batch)
    generator = None if training else torch.Generator(differing.device).manual_seed(0)
    images, texts = F.normalize(pairs.images.detach(), dim=-1), F.normalize(pairs.texts.detach(), dim=-1)
    likeness = pairs.scale.detach() * images @ texts.T  # (p, p)
    chosen = differing.any(dim=1).nonzero()[:, 0]
    if not len(chosen):
        return Negatives(chosen, chosen, chosen)

    def drawn(scores: Tensor) -> Tensor:
        odds = scores.masked_fill(~differing, -torch.inf)[chosen].softmax(dim=-1)
        return torch.multinomial(odds, 1, generator=generator)[:, 0]

    return Negatives(chosen, drawn(likeness), drawn(likeness.T))


def matched(model: VLMModel, batch: Batch, keys_values: Tensor, negatives: Negatives) -> tuple[Tensor, Tensor]:
    """The loss, summed over the q pairs that have a negative, each the mean over its three readings; and the share of these
    that are judged right, summed likewise. Both are 0 without such a pair, and the loss still reaches every weight.

    keys_values: of the batch's pictures, from `VLMModel.picture_keys_values`.
    """
    chosen = negatives.chosen
    texts = torch.cat([chosen, negatives.texts, chosen])  # (3 q,)
    pictures = batch["pair_images"][torch.cat([chosen, chosen, negatives.pictures])]
    wanted = torch.zeros_like(texts)
    wanted[: len(chosen)] = 1
    if not len(chosen):
        # Every rank runs the same modules whatever its data: a reading that nothing is learnt from.
        texts = pictures = texts.new_zeros(1)
    ids, mask = batch["pair_input_ids"][texts], batch["pair_attention_mask"][texts]
    logits = model.match(ids, mask, keys_values, pictures[:, None]).float()
    if not len(chosen):
        return logits.sum() * 0.0, logits.new_zeros(())
    loss = F.cross_entropy(logits, wanted, reduction="sum")
    return loss / 3, (logits.argmax(dim=-1) == wanted).sum() / 3
