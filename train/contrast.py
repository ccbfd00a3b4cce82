"""Pictures against texts over a whole step, however micro-batches and ranks cut it up.

GradCache (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"): every micro-batch is
embedded without a graph, the loss over all embeddings gives the gradient of each, and every micro-batch is embedded again,
with the same random numbers, to take its gradients on to the weights. The gradient is that of the uncut batch.

Knows embeddings, random states and the losses of `vlm.losses`. Knows nothing of how embeddings are made, or of optimizers.

Shapes: n pairs of a micro-batch on this rank, E embedding size; K micro-batches a step on each rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.losses import infonce, siglip
from vlm.model import VLMModel

from .config_stage import Stage
from .ranks import data_group


class Pairs(NamedTuple):
    """Pictures and texts in the shared space, (n, E) each, not normalised; scale and bias (1,) of their likeness; all float32.

    bias: None for InfoNCE, which has none.
    """

    images: Tensor
    texts: Tensor
    scale: Tensor
    bias: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All that is there."""
        return [value for value in self if value is not None]

    def leaves(self) -> Pairs:
        """The same values at the beginning of a graph."""
        return Pairs(*[value.detach().requires_grad_() for value in self.tensors()])


class RandomState(NamedTuple):
    """What the generators of the CPU and of the device, if that is another one, will draw next."""

    cpu: Tensor
    device: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """The present state."""
        beside = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return cls(torch.get_rng_state(), beside)

    def set(self, device: torch.device) -> None:
        """Go back to this state."""
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.get_device_module(device).set_rng_state(self.device, device)


class Contrast(NamedTuple):
    """A micro-batch's part in the loss of its step.

    random: the state in which it was embedded. gradients: of the loss with regard to its pairs. loss, first: its share of
    the loss, and of the pictures whose own text ranks first; over micro-batches and ranks, their means are the step's.
    """

    random: RandomState
    gradients: list[Tensor]
    loss: Tensor
    first: Tensor


def pairs_of(model: VLMModel, stage: Stage, images: Tensor, texts: Tensor) -> Pairs:
    """Embeddings as the model makes them, with the scale and bias that the stage's loss takes."""
    # CLIP, section 2.5: the scale is held below 100, beyond which training is unstable.
    scale = model.logit_scale.float().exp().clamp(max=100.0)
    # A copy: ZeRO-3 takes a parameter away when the forward pass is over.
    bias = model.logit_bias.float().clone() if stage.loss == "siglip" else None
    return Pairs(images.float(), texts.float(), scale, bias)


def whole_step(pairs: Sequence[Pairs], randoms: Sequence[RandomState]) -> list[Contrast]:
    """Each micro-batch's part in the loss over the pairs of all micro-batches and ranks; a collective call.

    pairs: those of this rank's K micro-batches, without a graph. randoms: the state before each was embedded.
    """
    with torch.enable_grad():
        leaves = [one.leaves() for one in pairs]
        images, texts = (torch.cat(rows) for rows in ([one.images for one in leaves], [one.texts for one in leaves]))
        loss, first = compared(leaves[0]._replace(images=images, texts=texts))
        # The engine will take the mean over micro-batches where this is a sum over them.
        wanted = [value for one in leaves for value in one.tensors()]
        found = torch.autograd.grad(loss * len(pairs), wanted, materialize_grads=True)
    size = len(leaves[0].tensors())
    gradients = [list(found[place : place + size]) for place in range(0, len(found), size)]
    return [Contrast(random, own, loss.detach(), first) for random, own in zip(randoms, gradients, strict=True)]


def compared(pairs: Pairs, part: Contrast | None = None) -> tuple[Tensor, Tensor]:
    """The contrastive loss and the share of pictures whose own text ranks first, of this rank; their means over ranks are
    those over the pairs of all ranks.

    part: what the whole step says of these pairs, if they are a part of more: loss and share are then `part`'s, and so is
    the gradient. Computed in float32, under autocast too: at a scale of 100 a bf16 product is off by a third.
    """
    if part is not None:
        products = [value * gradient for value, gradient in zip(pairs.tensors(), part.gradients, strict=True)]
        carried = torch.stack([product.sum() for product in products]).sum()
        return part.loss + (carried - carried.detach()), part.first
    with torch.autocast(pairs.images.device.type, enabled=False):
        images, texts = F.normalize(pairs.images, dim=-1), F.normalize(pairs.texts, dim=-1)
        if pairs.bias is None:
            loss, first, mean_pairs = infonce(images, texts, pairs.scale, data_group())
        else:
            loss, first, mean_pairs = siglip(images, texts, pairs.scale, pairs.bias, data_group())
    return loss / max(1.0, mean_pairs), first / max(1.0, mean_pairs)


@contextmanager
def replayed(part: Contrast | None, device: torch.device) -> Iterator[None]:
    """Within it, what is drawn at random is what was drawn when `part` was first embedded; None: nothing was."""
    if part is None:
        yield
        return
    before = RandomState.now(device)
    part.random.set(device)
    try:
        yield
    finally:
        before.set(device)
