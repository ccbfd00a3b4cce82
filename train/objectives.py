"""The four things a stage can train for. An objective owns the model and turns a batch into a loss and a few numbers.

Knows the batches of `batches.py` and the losses of `vlm.losses`. Knows nothing of optimizers, ranks, steps or files.

An objective's loss is the sum over its own targets divided by `mean_targets`, the mean number of targets over micro-batches
and ranks: the mean of such losses over micro-batches and ranks is the sum over all targets divided by their number. The
numbers in the logs are made to be averaged in the same way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vlm.linear_cross_entropy import linear_cross_entropy
from vlm.losses import count_targets, documents_right, infonce, labelled, siglip
from vlm.model import VLMModel
from vlm.routing import balances, router_loss

from .config import Stage

Batch = dict[str, Any]
Logs = dict[str, Tensor]


class Objective(nn.Module, ABC):
    """A model with what it is trained for."""

    def __init__(self, model: VLMModel, stage: Stage) -> None:
        super().__init__()
        self.model = model
        self.stage = stage

    @abstractmethod
    def reads(self) -> tuple[str, ...]:
        """How the names of the parameters begin that the loss depends on; others would only decay."""

    @abstractmethod
    def targets(self, batch: Batch) -> int:
        """How many things this batch asks to be predicted."""

    @abstractmethod
    def forward(self, batch: Batch, mean_targets: float) -> tuple[Tensor, Logs]:
        """The loss, and numbers to log."""


class Contrastive(Objective):
    """Pictures against texts over all ranks: InfoNCE or SigLIP. The negatives are those of one micro-batch of all ranks."""

    def reads(self) -> tuple[str, ...]:
        return *_sight(), *_shared_space(self.model, self.stage)

    def targets(self, batch: Batch) -> int:
        return len(batch["input_ids"])

    def forward(self, batch: Batch, mean_targets: float) -> tuple[Tensor, Logs]:
        images = self.model.encode_image(batch["pixel_values"], normalize=False)
        texts = self.model.encode_text(batch["input_ids"], batch["attention_mask"], normalize=False)
        loss, first, _ = _match(self.model, self.stage, images, texts)
        return loss / mean_targets, {"top1": first / mean_targets, "logit_scale": self.model.logit_scale.detach().exp()}


class Joint(Objective):
    """Captions and answers, token by token, through the adapters; optionally a contrastive term on the same pictures."""

    def reads(self) -> tuple[str, ...]:
        shared = _shared_space(self.model, self.stage) if self.stage.contrastive_weight else ()
        return *_sight(), "adapters.", "language_model.", *shared

    def targets(self, batch: Batch) -> int:
        return count_targets(batch["labels"], shift=True)

    def forward(self, batch: Batch, mean_targets: float) -> tuple[Tensor, Logs]:
        states = self.model.image_states(batch["pixel_values"])
        inputs = {name: batch[name] for name in ("input_ids", "position_ids", "document_ids", "token_image")}
        inputs["image_keys_values"] = self.model.image_keys_values(states, batch["image_slots"])
        loss, right, logs = _predict(self.model, inputs, batch["labels"], True, mean_targets)
        if not self.training:
            documents = int(batch["document_ids"].max())
            logs["documents_right"] = documents_right(right, batch["labels"], batch["document_ids"], documents)
        if self.stage.contrastive_weight:
            contrastive = self._contrastive(states, batch)
            logs = {"token_loss": loss.detach()} | logs | {"contrastive_loss": contrastive.detach()}
            loss = loss + self.stage.contrastive_weight * contrastive
        return loss, logs

    def _contrastive(self, states: Tensor, batch: Batch) -> Tensor:
        """This rank's part: the mean of it over ranks is the mean over the pairs of all ranks."""
        images = self.model.image_pool(states)[batch["pair_images"]]
        texts = self.model.encode_text(batch["pair_input_ids"], batch["pair_attention_mask"], normalize=False)
        loss, _, mean_pairs = _match(self.model, self.stage, images, texts[: len(images)])
        return loss / max(1.0, mean_pairs)


class Clm(Objective):
    """Text only: each token from those before it."""

    bidirectional = False

    def reads(self) -> tuple[str, ...]:
        return ("language_model.",)

    def targets(self, batch: Batch) -> int:
        return count_targets(batch["labels"], self._shift)

    def forward(self, batch: Batch, mean_targets: float) -> tuple[Tensor, Logs]:
        inputs = {"input_ids": batch["input_ids"], "document_ids": batch["attention_mask"].long()}
        inputs["bidirectional"] = self.bidirectional
        loss, _, logs = _predict(self.model, inputs, batch["labels"], self._shift, mean_targets)
        return loss, logs

    @property
    def _shift(self) -> bool:
        return self.model.config.reading == "causal"


class Mlm(Clm):
    """Text only: hidden tokens from those on both sides. Decoders read both ways and predict from the position before."""

    bidirectional = True


OBJECTIVES: dict[str, type[Objective]] = {"contrastive": Contrastive, "joint": Joint, "clm": Clm, "mlm": Mlm}


def _sight() -> tuple[str, ...]:
    return "vision.", "image_positions", "resampler."


def _shared_space(model: VLMModel, stage: Stage) -> tuple[str, ...]:
    base = f"language_model.{model.language_model.base_model_prefix}."
    bias = ("logit_bias",) if stage.loss == "siglip" else ()
    return base, "image_pool.", "text_projection.", "logit_scale", *bias


def _predict(
    model: VLMModel, inputs: dict[str, Any], labels: Tensor, shift: bool, mean_targets: float
) -> tuple[Tensor, Tensor, Logs]:
    """The loss of the labelled tokens, which of them (T,) are predicted right, and numbers to log.

    A mixture of experts adds its router loss, as it is: a mean over this batch's tokens.
    """
    text = model.config.text_config
    output = model.states(**inputs, output_router_logits=True if balances(text) else None)
    hidden, wanted = labelled(output.last_hidden_state, labels, shift)
    total, right = linear_cross_entropy(model.language_model, hidden, wanted)
    loss, logs = total / mean_targets, {"token_accuracy": right.sum() / mean_targets}
    if balances(text) and output.router_logits:
        balance, busiest = router_loss(text, output.router_logits, inputs["document_ids"] > 0)
        logs |= {"token_loss": loss.detach(), "router_loss": balance.detach(), "router_busiest": busiest}
        loss = loss + text.router_aux_loss_coef * balance
    return loss, right, logs


def _match(model: VLMModel, stage: Stage, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, float]:
    """The contrastive loss of `vlm.losses` over embeddings (n, E) as the model makes them, in float32."""
    images, texts = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
    # CLIP, section 2.5: the scale is held below 100, beyond which training is unstable.
    scale = model.logit_scale.float().exp().clamp(max=100.0)
    if stage.loss == "siglip":
        return siglip(images, texts, scale, model.logit_bias.float())
    return infonce(images, texts, scale)
