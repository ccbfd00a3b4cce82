"""What a training config may say of a run: its fields, their defaults and their contradictions.

Knows names, types and numbers. Knows nothing of models, data or DeepSpeed objects; what is said of the model stands in
`config_model.py`, what of a stage in `config_stage.py`. Each field's description is its documentation:
`vlm.settings.annotated_yaml` writes it beside the value.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from vlm.errors import UsageError
from vlm.settings import COMMAND_LINE, Section, Settings, read_settings
from vlm.settings_faults import explain

from .config_model import Model
from .config_stage import ObjectiveName, Stage

SHORTHANDS = {"vision": "model.vision", "text": "model.text", "adapter": "model.adapter"}


class Source(Section):
    """One set of shards among several."""

    path: str = Field(description="folder with index.json, a .tar, or {00000..00012}.tar")
    weight: PositiveFloat = Field(1.0, description="how often it is drawn from, relative to the others")
    objectives: list[ObjectiveName] | None = Field(
        None, min_length=1, description="objectives that draw from it, such as [joint] for text alone; null: all"
    )

    def serves(self, objective: str) -> bool:
        """Whether stages of this objective draw from it."""
        return self.objectives is None or objective in self.objectives


class Augment(Section):
    """Random changes of training pictures that leave true what is said of them, in English; the fields of `Augmentation`."""

    mirror: NonNegativeFloat = Field(
        0.0, le=1, description="probability of a mirror image, where no text names a side or what is written"
    )
    crop: NonNegativeFloat = Field(
        0.0, lt=1, description="largest share of the area cut off, where no text names a place, number or size"
    )
    colour: NonNegativeFloat = Field(
        0.0, le=1, description="largest change of hue and saturation, where no text names a colour"
    )
    light: NonNegativeFloat = Field(
        0.0, le=1, description="largest change of brightness and contrast, where no text names a colour or light"
    )


def _as_sources(value: Any) -> Any:
    listed = value if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in listed]


class Data(Section):
    """What it learns from."""

    train: Annotated[list[Source], BeforeValidator(_as_sources)] = Field(
        min_length=1, description="shards to learn from: a path, or a list of {path, weight}"
    )
    val: str | None = Field(None, description="shards held out, for validation")
    workers: NonNegativeInt = Field(2, description="processes per rank that read and decode")
    augment: Augment = Field(Augment(), description="random changes of training pictures")


class Checkpoint(Section):
    """Resumable states under OUT/checkpoints."""

    every: PositiveInt = Field(500, description="optimizer steps between two")
    keep: PositiveInt = Field(3, description="how many of the newest stay")


class Validation(Section):
    """Scores on data.val while it trains."""

    every: PositiveInt = Field(500, description="optimizer steps between two")
    samples: PositiveInt = Field(256, description="samples of data.val each time")
    keep_best: bool = Field(
        False, description="keep the model with the lowest validation loss of the last stage in OUT/best"
    )
    patience: PositiveInt | None = Field(
        None, description="end a stage after so many validations in a row without a lower loss; null: never"
    )


class Watch(Section):
    """What the log tells of a run beside its losses."""

    every: NonNegativeInt = Field(
        50, description="optimizer steps between two looks at gates, gradients, looking gap and memory; 0: never"
    )


class Log(Section):
    """Where curves are drawn beside OUT/tensorboard; both stay on this machine unless their own settings say otherwise."""

    wandb: str | None = Field(None, description="project of Weights & Biases; offline unless WANDB_MODE=online")
    trackio: str | None = Field(None, description="project of trackio")


class Config(Section):
    """A whole run."""

    seed: NonNegativeInt = Field(0, description="decides every random number of the run")
    out: str = Field("runs/mine", description="folder for log.jsonl, checkpoints/, model/ and config.yaml")
    minutes: PositiveFloat | None = Field(None, description="budget of the run; the stages' minutes are scaled to it")
    model: Model = Field(description="what is trained")
    data: Data = Field(description="what it learns from")
    stages: list[Stage] = Field(min_length=1, description="one after the other, each from what the one before left")
    precision: Literal["bf16", "fp16", "fp32"] = Field(
        "bf16", description="numbers in matrix products; weights stay fp32, but for fp16"
    )
    zero: NonNegativeInt = Field(0, le=3, description="DeepSpeed ZeRO stage: what is split over the ranks")
    tensor_parallel: PositiveInt = Field(
        1, description="processes that hold one language model and its adapters together, a share of the heads each"
    )
    deepspeed: dict[str, Any] | str = Field({}, description='more of DeepSpeed, or a JSON file; "auto" is filled in')
    attention: Literal["auto", "sdpa", "eager"] = Field(
        "auto",
        description="sdpa: fused kernels; eager: plain matrix products; auto: eager on CPUs, where that is faster, for rows of "
        "up to 1024 tokens",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations layer by layer: less memory, a third more time"
    )
    compile: bool = Field(False, description="torch.compile the model: a minute to start, faster steps")
    checkpoint: Checkpoint = Field(Checkpoint(), description="resumable states")
    validation: Validation = Field(Validation(), description="scores on data.val while it trains")
    watch: Watch = Field(Watch(), description="what the log tells beside the losses")
    log: Log = Field(Log(), description="where curves are drawn beside TensorBoard")

    @model_validator(mode="after")
    def _something_to_validate_on(self) -> Config:
        if self.data.val is None and (self.validation.keep_best or self.validation.patience is not None):
            name = "keep_best" if self.validation.keep_best else "patience"
            raise ValueError(
                f"validation.{name} is set, and there is nothing to validate on; set data.val, or remove it"
            )
        return self

    @model_validator(mode="after")
    def _every_stage_has_a_source(self) -> Config:
        for number, stage in enumerate(self.stages):
            if not any(source.serves(stage.objective) for source in self.data.train):
                raise ValueError(
                    f"none of the {len(self.data.train)} sources of data.train serves objective {stage.objective} of "
                    f"stages.{number}; add it to the objectives of one"
                )
        return self

    @model_validator(mode="after")
    def _share_minutes(self) -> Config:
        if self.minutes is None:
            return self
        shares = [stage.minutes for stage in self.stages if stage.minutes is not None]
        if len(shares) < len(self.stages):
            raise ValueError(
                f"minutes {self.minutes:g} is shared among stages in minutes, and "
                f"{len(self.stages) - len(shares)} of {len(self.stages)} stages count steps; change one"
            )
        scale = self.minutes / sum(shares)
        for stage in self.stages:
            stage.minutes = (stage.minutes or 0.0) * scale
        return self


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The config of a YAML file, or of a packaged one by name, with `key.sub=value` overrides.

    Raises UsageError that names the key and the line for an unknown key, a wrong type or a contradiction.
    """
    settings = read_settings(_find(str(path)), overrides or [], SHORTHANDS)
    _let_command_line_choose(settings)
    try:
        return Config.model_validate(settings.values)
    except ValidationError as error:
        raise UsageError(explain(error, settings, Config)) from None


def packaged_configs() -> dict[str, Path]:
    """Name -> path of the recipes that come with the package."""
    folder = Path(str(resources.files("vlm.configs")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _find(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    packaged = packaged_configs()
    short = name.removeprefix("configs/").removesuffix(".yaml")
    if short in packaged:
        return packaged[short]
    raise UsageError(f"config {name} does not exist; give a YAML file, or one that comes along: {', '.join(packaged)}")


def _let_command_line_choose(settings: Settings) -> None:
    """`stages.0.steps=10` on a stage in minutes means steps instead, and the other way round."""
    stages = settings.values.get("stages")
    for index, stage in enumerate(stages if isinstance(stages, list) else []):
        for chosen, other in (("steps", "minutes"), ("minutes", "steps")):
            given = [settings.marks.get(("stages", index, name)) == COMMAND_LINE for name in (chosen, other)]
            if isinstance(stage, dict) and given == [True, False]:
                stage.pop(other, None)
