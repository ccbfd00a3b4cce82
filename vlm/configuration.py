"""The shape of a composite: which vision tower, which language model, how they are linked.

Knows numbers and names only. Knows nothing of modules, weights or training.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from vlm.errors import UsageError


@dataclass(frozen=True)
class AdapterConfig:
    """How the language model looks at pictures: gated cross-attention (Flamingo, Alayrac et al. 2022, section 3.1.2).

    every: an adapter stands before each `every`-th layer, the last one of each group of `every` layers.
    layers: exact layer indices instead of `every`.
    heads, kv_heads, head_dim: attention shape; None takes the language model's own. `kv_heads` < `heads` shares keys (GQA).
    feed_forward: width of the adapter's feed-forward as a multiple of the hidden size; 0 leaves it out.
    experts, experts_per_token: that many feed-forwards of that width, of which a router chooses so many for each token
    (Shazeer et al. 2017); 0 experts is one feed-forward for all tokens.
    balance: weight in training of the loss that keeps the router even (Switch Transformer, Fedus et al. 2021).
    gate_init: value of α at birth; the branch enters scaled by tanh(α). 0 makes a new composite equal its language model.
    qk_norm: RMS-normalise queries and keys per head.
    positions: "sincos" (fixed, 2-D) or "learned", added to the image tokens before they become keys and values.
    latents: a perceiver resampler turns the image tokens into this many latents; 0 leaves them as they are.
    resampler_depth: layers of that resampler.
    """

    every: int = 1
    layers: tuple[int, ...] | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    feed_forward: float = 4.0
    experts: int = 0
    experts_per_token: int = 2
    balance: float = 0.01
    gate_init: float = 0.0
    qk_norm: bool = False
    positions: str = "sincos"
    latents: int = 0
    resampler_depth: int = 2

    def __post_init__(self) -> None:
        if self.positions not in ("sincos", "learned"):
            raise UsageError(f"adapter.positions is {self.positions!r}; it must be 'sincos' or 'learned'")
        if self.every < 1:
            raise UsageError(f"adapter.every is {self.every}; it must be at least 1")
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise UsageError(
                f"adapter.experts_per_token is {self.experts_per_token} and adapter.experts is {self.experts}; choose 1 to "
                f"{self.experts}"
            )
        if self.experts and not self.feed_forward:
            raise UsageError(
                f"adapter.experts is {self.experts} and adapter.feed_forward is 0; an expert is a feed-forward, so give its "
                "width"
            )
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AdapterConfig:
        """Build from plain values; an unknown key is refused by name."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UsageError(f"adapter has no field {unknown[0]!r}; fields are {', '.join(sorted(known))}")
        return cls(**values)

    def chosen_layers(self, depth: int) -> tuple[int, ...]:
        """Indices, in order, of the language model's `depth` layers that get an adapter."""
        chosen = self.layers if self.layers is not None else tuple(range(self.every - 1, depth, self.every))
        if not chosen or min(chosen) < 0 or max(chosen) >= depth:
            raise UsageError(
                f"adapter layers {list(chosen)} do not fit a language model of {depth} layers; "
                f"choose indices from 0 to {depth - 1}, or adapter.every ≤ {depth}"
            )
        return chosen


@dataclass(frozen=True)
class VisionConfig:
    """A vision tower, rebuilt without its weights from these values.

    name: "timm:ARCHITECTURE" or "open_clip:ARCHITECTURE".
    image_size: (height, width) in pixels; None takes the architecture's own.
    kwargs: passed on to `timm.create_model` (patch_size, embed_dim, depth, num_heads, …).
    stem: "patch" (the architecture's own patch embedding) or "conv" (stride-2 convolutions, Xiao et al. 2021).
    """

    name: str
    image_size: tuple[int, int] | None = None
    kwargs: dict[str, Any] | None = None
    stem: str = "patch"

    def __post_init__(self) -> None:
        library = self.name.partition(":")[0]
        if library not in ("timm", "open_clip"):
            raise UsageError(f"vision tower {self.name!r} names no library; write timm:NAME or open_clip:NAME")
        if self.stem not in ("patch", "conv"):
            raise UsageError(f"vision stem is {self.stem!r}; it must be 'patch' or 'conv'")
        if self.image_size is not None:
            height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
            object.__setattr__(self, "image_size", (int(height), int(width)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VisionConfig:
        """Build from plain values; an unknown key is refused by name."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UsageError(f"vision has no field {unknown[0]!r}; fields are {', '.join(sorted(known))}")
        return cls(**values)


class VLMConfig(PreTrainedConfig):
    """Configuration of a `VLMModel`.

    vision: fields of `VisionConfig`. text_config: any Hugging Face language model's configuration.
    adapter: fields of `AdapterConfig`. embedding_dim: size of the shared contrastive space.
    image_token_id: the token that stands for a picture in the text. mask_token_id: the token that MLM fills in.
    matching: whether there is a head that judges if a text goes with a picture; training with `matching_weight` puts it in.
    quantization: what `vlm.quantization.quantize` did, {"scheme": "int8" | "int4", "vision": bool, "base": bool}; None for nothing.
    """

    model_type = "vlm"
    sub_configs = {"text_config": AutoConfig}

    vision: dict | None = None
    text_config: dict | PreTrainedConfig | None = None
    adapter: dict | None = None
    embedding_dim: int = 256
    image_token_id: int | None = None
    mask_token_id: int | None = None
    matching: bool = False
    quantization: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            self.text_config = AutoConfig.for_model(**self.text_config)
        if self.text_config is not None:
            self.tie_word_embeddings = False  # tying belongs to the language model, which does its own
        self.adapter = dict(self.adapter or {})
        super().__post_init__(**kwargs)

    @property
    def vision_config(self) -> VisionConfig:
        """The vision tower as a checked value object."""
        return VisionConfig.from_dict(self.vision or {})

    @property
    def adapter_config(self) -> AdapterConfig:
        """The adapters as a checked value object."""
        return AdapterConfig.from_dict(self.adapter or {})

    @property
    def reading(self) -> str:
        """What the family does: "masked" for encoder families (BERT, ModernBERT, …), "causal" for decoder families."""
        text = self.text_config
        assert isinstance(text, PreTrainedConfig), "__post_init__ made a configuration of it"
        masked = text.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(text, "is_decoder", False)
        return "masked" if masked else "causal"
