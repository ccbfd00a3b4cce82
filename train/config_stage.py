"""What a training config may say of a stage: objective, budget, schedule, what of the model trains.

Knows names, types and numbers. Knows nothing of objectives or optimizers. Each field's description is its documentation.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from vlm.settings import Section

ObjectiveName = Literal["contrastive", "joint", "clm", "mlm"]


class Lora(Section):
    """Low-rank updates in place of full ones (Hu et al. 2021), by peft."""

    r: PositiveInt = Field(8, description="rank")
    alpha: PositiveFloat | None = Field(None, description="scale is alpha / r; null: 2 r")
    dropout: NonNegativeFloat = Field(0.0, description="dropout before the update")
    targets: list[str] | None = Field(
        None, description="names or patterns of linear layers; null: all of the towers' but the head"
    )
    towers: list[Literal["text", "vision"]] = Field(["text"], min_length=1, description="whose layers: text, vision")
    dora: bool = Field(False, description="length and direction of weights apart (DoRA, Liu et al. 2024)")
    rslora: bool = Field(False, description="scale alpha / √r (rank-stabilised, Kalajdzievski 2023)")


OBJECTIVE_ONLY = {
    "contrastive_weight": ("joint",),
    "matching_weight": ("joint",),
    "questions": ("joint",),
    "mask_share": ("mlm",),
    "pack": ("joint", "clm", "mlm"),
    "loss": ("contrastive", "joint"),
}


class Stage(Section):
    """One stage of training; it starts from what the one before left."""

    objective: ObjectiveName = Field(
        description="contrastive: pictures against texts; joint: captions and answers; clm, mlm: text only"
    )
    steps: PositiveInt | None = Field(None, description="optimizer steps; this or minutes")
    minutes: PositiveFloat | None = Field(None, description="wall-clock budget; the schedule follows the share used")
    batch: PositiveInt = Field(64, description="samples per optimizer step, over all ranks")
    micro_batch: PositiveInt | None = Field(
        None,
        description="samples a rank holds at once; null: its whole share. The loss is that of the whole batch either way",
    )
    lr: PositiveFloat = Field(1e-3, description="highest learning rate")
    warmup: NonNegativeFloat = Field(0.05, le=1, description="share of the stage in which the rate climbs")
    schedule: Literal["cosine", "linear", "wsd", "constant"] = Field(
        "cosine", description="how the rate goes on after that; wsd: constant, in the last fifth linear to 0"
    )
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="adamw; muon for the matrices, adamw for the rest")
    weight_decay: NonNegativeFloat = Field(0.05, description="on matrices only")
    clip: NonNegativeFloat = Field(1.0, description="largest gradient norm; 0, and with muon: no limit")
    ema: PositiveFloat | None = Field(
        None,
        lt=1,
        description="decay of a moving average of the weights, e.g. 0.999, which the stage leaves instead of them",
    )
    train: list[str] = Field(["*"], description="patterns of the parameter names that train")
    freeze: list[str] = Field([], description="patterns of those that do not, whatever train says")
    rates: dict[str, PositiveFloat] = Field(
        {},
        description="patterns of parameter names, each with what it multiplies lr by, e.g. {vision: 0.1}; of several that "
        "match a parameter the first counts",
    )
    lora: Lora | None = Field(None, description="low-rank updates of frozen linear layers, e.g. {r: 8}")
    loss: Literal["infonce", "siglip"] = Field("infonce", description="contrastive loss")
    questions: PositiveInt | None = Field(
        None, description="joint: most questions of a picture per visit, drawn anew each time; null: all"
    )
    max_tokens: PositiveInt = Field(
        1024, description="longest row of tokens; documents beyond it wait for another visit"
    )
    pack: bool = Field(
        True, description="joint, clm, mlm: short samples share rows, kept apart; the same losses with less padding"
    )
    contrastive_weight: NonNegativeFloat = Field(
        0.0, description="joint: weight of an added contrastive term over all pairs of the batch"
    )
    matching_weight: NonNegativeFloat = Field(
        0.0,
        description="joint: weight of an added term that tells true pairs from wrong ones; the likest of the micro-batch are "
        "confused most, by the contrastive term's measure",
    )
    mask_share: PositiveFloat = Field(0.15, lt=1, description="mlm: share of the tokens to be predicted")

    @model_validator(mode="after")
    def _consistent(self) -> Stage:
        if self.steps is None and self.minutes is None:
            raise ValueError("neither steps nor minutes is set; give one")
        if self.steps is not None and self.minutes is not None:
            raise ValueError(f"steps {self.steps} and minutes {self.minutes:g} are both set; remove one")
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise ValueError(f"batch {self.batch} is no multiple of micro_batch {self.micro_batch}; change one")
        if self.matching_weight and self.objective == "joint" and not self.contrastive_weight:
            raise ValueError(
                f"matching_weight is {self.matching_weight:g} and contrastive_weight is 0, which learns what is alike; set "
                "it too"
            )
        if self.is_changed("loss") and self.objective == "joint" and not self.contrastive_weight:
            raise ValueError(
                f"loss is {self.loss} and contrastive_weight is 0, so nothing uses it; set contrastive_weight, or remove loss"
            )
        if self.optimizer == "muon" and self.clip not in (0.0, type(self).model_fields["clip"].default):
            raise ValueError(f"clip is {self.clip:g}, and optimizer muon has no limit; remove clip")
        for name, objectives in OBJECTIVE_ONLY.items():
            if self.objective not in objectives and self.is_changed(name):
                belongs = " or ".join(objectives)
                raise ValueError(f"{name} belongs to objective {belongs}, not {self.objective}; remove it")
        return self
