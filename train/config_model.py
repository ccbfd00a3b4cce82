"""What a training config may say of the model: towers by name or by sizes, tokenizer, adapters.

Knows names, types and numbers. Knows nothing of models or of how they train. Each field's description is its documentation.
"""

from __future__ import annotations

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
    model_validator,
)

from vlm.settings import Section


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
        if self.path is not None and self.is_changed("vocab_size"):
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
            if self.path is not None and self.is_changed(name):
                raise ValueError(
                    f"model.path and model.{name} are both set, and a saved model brings its own; remove model.{name}"
                )
        return self
