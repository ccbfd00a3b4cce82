"""What a training config may say: its fields, their defaults and their contradictions.

Knows names, types and numbers. Knows nothing of models, data or DeepSpeed objects. Each field's description is its
documentation: `vlm.settings.annotated_yaml` writes it beside the value.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    model_validator,
)

from vlm.errors import UsageError
from vlm.settings import COMMAND_LINE, Section, Settings, read_settings
from vlm.settings_faults import explain

SHORTHANDS = {"vision": "model.vision", "text": "model.text", "adapter": "model.adapter"}


def _is_changed(section: Section, name: str) -> bool:
    """Whether a value is not the default; whether it was written tells nothing, for OUT/config.yaml writes them all."""
    return getattr(section, name) != type(section).model_fields[name].default


def _as_pair(value: Any) -> Any:
    return [value, value] if isinstance(value, int) else value


class VisionSizes(Section):
    """A vision tower by its architecture's name, with its sizes changed where they are given."""

    name: str = Field(description="timm:ARCHITECTURE or open_clip:ARCHITECTURE")
    pretrained: bool = Field(False, description="start from the library's own weights instead of random ones")
    image_size: Annotated[list[PositiveInt], BeforeValidator(_as_pair)] | None = Field(
        None, min_length=2, max_length=2, description="pixels, one number or [height, width]"
    )
    patch_size: PositiveInt | None = Field(None, description="pixels of a patch's side")
    width: PositiveInt | None = Field(None, description="features of a token")
    depth: PositiveInt | None = Field(None, description="layers")
    heads: PositiveInt | None = Field(None, description="attention heads")
    stem: Literal["patch", "conv"] = Field("patch", description="patch: one big convolution; conv: a few small ones")
    options: dict[str, Any] = Field({}, description="anything else of timm.create_model or open_clip.create_model")


class TextSizes(Section):
    """A language model from scratch: a Hugging Face family and its sizes."""

    family: str = Field(description="model_type of a Hugging Face family: qwen3, llama, gpt2, bert, …")
    width: PositiveInt = Field(description="hidden size")
    depth: PositiveInt = Field(description="layers")
    heads: PositiveInt = Field(description="attention heads")
    kv_heads: PositiveInt | None = Field(None, description="heads of keys and values; null: as many as heads")
    feed_forward: PositiveFloat = Field(4.0, description="width of the feed-forward as a multiple of the hidden size")
    positions: PositiveInt = Field(1024, description="longest text in tokens")
    options: dict[str, Any] = Field({}, description="anything else of the family's own configuration class")


class Adapter(Section):
    """The gated cross-attention adapters; the fields of `vlm.configuration.AdapterConfig`."""

    every: PositiveInt = Field(1, description="an adapter before each every-th layer of the language model")
    layers: list[NonNegativeInt] | None = Field(None, description="exact layer indices instead of every")
    heads: PositiveInt | None = Field(None, description="attention heads; null: the language model's number")
    kv_heads: PositiveInt | None = Field(None, description="heads of keys and values; null: as many as heads")
    head_dim: PositiveInt | None = Field(None, description="size of a head; null: hidden size / heads")
    feed_forward: NonNegativeFloat = Field(4.0, description="width of its feed-forward / hidden size; 0: none")
    experts: NonNegativeInt = Field(
        0, description="feed-forwards beside each other, of which each token passes a few; 0: one for all"
    )
    experts_per_token: PositiveInt = Field(2, description="how many of them a token passes")
    balance: NonNegativeFloat = Field(0.01, description="weight of the loss that keeps the experts evenly used")
    gate_init: float = Field(0.0, description="gates at birth; 0 keeps a pretrained language model as it is")
    qk_norm: bool = Field(False, description="normalise queries and keys per head; steadier from scratch")
    positions: Literal["sincos", "learned"] = Field("sincos", description="positions of the image tokens")
    latents: NonNegativeInt = Field(0, description="a perceiver resampler to this many tokens per picture; 0: none")
    resampler_depth: PositiveInt = Field(2, description="layers of that resampler")


def _is_name(value: Any) -> str:
    return "<name>" if isinstance(value, str) else "<sizes>"


VisionSpec = Annotated[Annotated[str, Tag("<name>")] | Annotated[VisionSizes, Tag("<sizes>")], Discriminator(_is_name)]
TextSpec = Annotated[Annotated[str, Tag("<name>")] | Annotated[TextSizes, Tag("<sizes>")], Discriminator(_is_name)]


class Tokenizer(Section):
    """The tokenizer of a language model that is trained from scratch."""

    vocab_size: PositiveInt = Field(4096, description="most tokens that the trained byte-level BPE may have")
    path: str | None = Field(None, description="one that exists, Hugging Face id or path, instead")

    @model_validator(mode="after")
    def _one_origin(self) -> Tokenizer:
        if self.path is not None and _is_changed(self, "vocab_size"):
            raise ValueError(
                f"vocab_size is {self.vocab_size}, and the tokenizer {self.path} has its own; remove one of vocab_size and path"
            )
        return self


class RopeScaling(Section):
    """Rotary positions stretched over longer texts, as transformers computes them."""

    type: Literal["linear", "yarn", "llama3"] = Field(
        description="linear: Chen et al. 2023; yarn: Peng et al. 2023; llama3: by wavelength, as Llama 3.1"
    )
    factor: float = Field(gt=1, description="how many times longer a text may be than it was")


class Model(Section):
    """What is trained."""

    path: str | None = Field(None, description="go on from this saved model, instead of vision and text")
    vision: VisionSpec | None = Field(
        None, description="pretrained tower timm:NAME, open_clip:NAME/TAG or a timm folder; or sizes, from scratch"
    )
    text: TextSpec | None = Field(
        None, description="pretrained language model, Hugging Face id or path; or family and sizes, from scratch"
    )
    tokenizer: Tokenizer = Field(Tokenizer(), description="for a language model from scratch")
    quantize: Literal["int8", "int4"] | None = Field(
        None,
        description="hold the language model's linear layers in so few bits, frozen, and let lora and the adapters learn "
        "beside them (QLoRA, Dettmers et al. 2023)",
    )
    rope_scaling: RopeScaling | None = Field(
        None, description="longer texts for a language model with rotary positions, e.g. {type: yarn, factor: 4}"
    )
    adapter: Adapter = Field(Adapter(), description="how the language model looks at pictures")
    embedding_dim: PositiveInt = Field(256, description="size of the space that pictures and texts share")

    @model_validator(mode="after")
    def _one_origin(self) -> Model:
        if self.path is not None and (self.vision is not None or self.text is not None):
            raise ValueError("model.path and model.vision or model.text are both set; write model={path: …} alone")
        if self.path is None and (self.vision is None or self.text is None):
            missing = "vision" if self.vision is None else "text"
            raise ValueError(f"model.{missing} is missing; give vision and text, or the path of a saved model")
        if isinstance(self.text, str) and self.tokenizer != Tokenizer():
            raise ValueError(f"model.tokenizer is set, and text {self.text!r} brings its own; remove model.tokenizer")
        if self.quantize is not None and isinstance(self.text, TextSizes):
            raise ValueError(
                f"model.quantize is {self.quantize}, and model.text is made from nothing and has to learn; name a pretrained "
                "one, or remove quantize"
            )
        return self

    @model_validator(mode="after")
    def _nothing_that_a_saved_model_brings(self) -> Model:
        for name in ("adapter", "embedding_dim", "tokenizer"):
            if self.path is not None and _is_changed(self, name):
                raise ValueError(
                    f"model.path and model.{name} are both set, and a saved model brings its own; remove model.{name}"
                )
        return self


ObjectiveName = Literal["contrastive", "joint", "clm", "mlm"]


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
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="how the rate goes on after that")
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
        if _is_changed(self, "loss") and self.objective == "joint" and not self.contrastive_weight:
            raise ValueError(
                f"loss is {self.loss} and contrastive_weight is 0, so nothing uses it; set contrastive_weight, or remove loss"
            )
        if self.optimizer == "muon" and self.clip not in (0.0, type(self).model_fields["clip"].default):
            raise ValueError(f"clip is {self.clip:g}, and optimizer muon has no limit; remove clip")
        for name, objectives in OBJECTIVE_ONLY.items():
            if self.objective not in objectives and _is_changed(self, name):
                belongs = " or ".join(objectives)
                raise ValueError(f"{name} belongs to objective {belongs}, not {self.objective}; remove it")
        return self


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
