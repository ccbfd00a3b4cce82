"""The four things a stage can train for. An objective owns the model and turns a batch into a loss and a few numbers.

Knows the batches of `batches.py` and the losses of `vlm.losses`. Knows nothing of optimizers, ranks, steps or files.

An objective's loss is the sum over its own targets divided by `mean_targets`, the mean number of targets over micro-batches
and ranks: the mean of such losses over micro-batches and ranks is the sum over all targets divided by their number. The
numbers in the logs are made to be averaged in the same way. What a micro-batch has to know of its whole step is its `Plan`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlm.linear_cross_entropy import linear_cross_entropy
from vlm.losses import count_targets, documents_right, labelled
from vlm.model import VLMModel, in_slots
from vlm.routing import balances, router_loss

from .config_stage import Stage
from .contrast import Contrast, Pairs, compared, pairs_of, replayed
from .matching import draw, matched, pairs_with_negatives

Batch = dict[str, Any]
Logs = dict[str, Tensor]


class Plan(NamedTuple):
    """What a micro-batch knows of its step; `step.prepare` makes it.

    mean_targets: targets, mean over micro-batches and ranks. contrast: its part in a comparison with other micro-batches;
    None where there are no others. mean_matches: pairs that have a negative to be told from, mean likewise.
    """

    mean_targets: float
    contrast: Contrast | None = None
    mean_matches: float = 1.0


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

    def matches(self, batch: Batch) -> int:
        """How many pairs of this batch are to be told from negatives."""
        return 0

    @property
    def compares(self) -> bool:
        """Whether the loss compares this batch with other micro-batches of its step; then it is a `Comparing` one."""
        return False

    def forward(self, batch: Batch, plan: Plan) -> tuple[Tensor, Logs]:
        """What `loss` returns."""
        return self.loss(batch, plan)

    @abstractmethod
    def loss(self, batch: Batch, plan: Plan) -> tuple[Tensor, Logs]:
        """The loss, and numbers to log."""


class Comparing(Objective):
    """One whose loss compares pictures with texts over all micro-batches of a step."""

    @abstractmethod
    def pairs(self, batch: Batch) -> Pairs:
        """Pictures and texts to be compared; what is drawn at random for them is drawn before anything else."""

    def forward(self, batch: Batch, plan: Plan | None) -> Any:
        """What `loss` returns; without a plan, the `pairs` that a plan is made of: DeepSpeed wants both to come this way."""
        return self.pairs(batch) if plan is None else self.loss(batch, plan)


class Contrastive(Comparing):
    """Pictures against texts over all micro-batches and ranks of a step: InfoNCE or SigLIP."""

    compares = True

    def reads(self) -> tuple[str, ...]:
        return *_sight(), *_shared_space(self.model, self.stage)

    def targets(self, batch: Batch) -> int:
        return len(batch["input_ids"])

    def loss(self, batch: Batch, plan: Plan) -> tuple[Tensor, Logs]:
        with replayed(plan.contrast, batch["input_ids"].device):
            pairs = self._pairs(batch, texts_twice=plan.contrast is not None)
        loss, top1 = compared(pairs, plan.contrast)
        return loss, {"top1": top1, "logit_scale": self.model.logit_scale.detach().exp()}

    def pairs(self, batch: Batch) -> Pairs:
        return self._pairs(batch, texts_twice=False)

    def _pairs(self, batch: Batch, texts_twice: bool) -> Pairs:
        """texts_twice: the text tower runs again in the backward pass, after that of the pictures, which come last here. So a
        micro-batch that carries the gradients of those before it holds the activations of one tower at a time."""
        read = partial(self.model.encode_text, batch["input_ids"], batch["attention_mask"], normalize=False)
        texts = checkpoint(read, use_reentrant=False) if texts_twice else read()
        images = self.model.encode_image(batch["pixel_values"], normalize=False)
        return pairs_of(self.model, self.stage, images, texts)


class Joint(Comparing):
    """Captions and answers, token by token, through the adapters; optionally, on the same pictures, a contrastive term and with
    it one that tells true pairs from wrong ones."""

    def reads(self) -> tuple[str, ...]:
        shared = _shared_space(self.model, self.stage) if self.stage.contrastive_weight else ()
        head = ("matching_head.",) if self.stage.matching_weight else ()
        return *_sight(), "adapters.", "language_model.", *shared, *head

    def targets(self, batch: Batch) -> int:
        return count_targets(batch["labels"], shift=True)

    def matches(self, batch: Batch) -> int:
        return pairs_with_negatives(batch) if self.stage.matching_weight else 0

    @property
    def compares(self) -> bool:
        return self.stage.contrastive_weight > 0

    def loss(self, batch: Batch, plan: Plan) -> tuple[Tensor, Logs]:
        with replayed(plan.contrast, batch["input_ids"].device):
            states = self.model.image_states(batch["pixel_values"])
            pairs = self._pairs(states, batch) if self.compares else None
        inputs = {name: batch[name] for name in ("input_ids", "position_ids", "document_ids", "token_image")}
        keys_values = self.model.picture_keys_values(states)
        inputs["image_keys_values"] = in_slots(keys_values, batch["image_slots"])
        loss, right, logs = _predict(self.model, inputs, batch["labels"], True, plan.mean_targets)
        if not self.training:
            documents = int(batch["document_ids"].max())
            logs["documents_right"] = documents_right(right, batch["labels"], batch["document_ids"], documents)
        if pairs is not None:
            contrastive, _ = compared(pairs, plan.contrast)
            logs = {"token_loss": loss.detach()} | logs | {"contrastive_loss": contrastive.detach()}
            loss = loss + self.stage.contrastive_weight * contrastive
        if pairs is not None and self.stage.matching_weight:
            matching, right = matched(self.model, batch, keys_values, draw(pairs, batch, self.training))
            matching, right = matching / plan.mean_matches, right / plan.mean_matches
            logs |= {"matching_loss": matching.detach(), "matching_accuracy": right}
            loss = loss + self.stage.matching_weight * matching
        return loss, logs

    def pairs(self, batch: Batch) -> Pairs:
        return self._pairs(self.model.image_states(batch["pixel_values"]), batch)

    def _pairs(self, states: Tensor, batch: Batch) -> Pairs:
        images = self.model.image_pool(states)[batch["pair_images"]]
        texts = self.model.encode_text(batch["pair_input_ids"], batch["pair_attention_mask"], normalize=False)
        return pairs_of(self.model, self.stage, images, texts[: len(images)])


class Clm(Objective):
    """Text only: each token from those before it."""

    bidirectional = False

    def reads(self) -> tuple[str, ...]:
        return ("language_model.",)

    def targets(self, batch: Batch) -> int:
        return count_targets(batch["labels"], self._shift)

    def loss(self, batch: Batch, plan: Plan) -> tuple[Tensor, Logs]:
        documents = batch.get("document_ids", batch["attention_mask"].long())
        inputs = {"input_ids": batch["input_ids"], "document_ids": documents, "bidirectional": self.bidirectional}
        inputs |= {"position_ids": batch["position_ids"]} if "position_ids" in batch else {}
        loss, _, logs = _predict(self.model, inputs, batch["labels"], self._shift, plan.mean_targets)
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

    A mixture of experts adds its router loss, as it is: a mean over this batch's tokens; in adapters, over those that see.
    """
    text = model.config.text_config
    adapters = model.config.adapter_config
    routed: list[Tensor] = []
    inputs = inputs | {"output_router_logits": True if balances(text) else None, "adapter_router_logits": routed}
    output = model.states(**inputs)
    hidden, wanted = labelled(output.last_hidden_state, labels, shift)
    total, right = linear_cross_entropy(model.language_model, hidden, wanted)
    loss, logs = total / mean_targets, {"token_accuracy": right.sum() / mean_targets}
    if balances(text) and output.router_logits:
        balance, busiest = router_loss(text.num_experts_per_tok, output.router_logits, inputs["document_ids"] > 0)
        logs |= {"token_loss": loss.detach(), "router_loss": balance.detach(), "router_busiest": busiest}
        loss = loss + text.router_aux_loss_coef * balance
    if routed:
        balance, busiest = router_loss(adapters.experts_per_token, routed, inputs["token_image"] >= 0)
        logs = {"token_loss": total.detach() / mean_targets} | logs
        logs |= {"adapter_router_loss": balance.detach(), "adapter_router_busiest": busiest}
        loss = loss + adapters.balance * balance
    return loss, right, logs
