"""Builds the model and the processor that a config describes: from scratch, pretrained towers, or a saved model.

Knows how sizes are spelled in timm and in each Hugging Face family. Knows nothing of data beyond the tokenizer's text,
nor of training.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vlm.configuration import VisionConfig, VLMConfig
from vlm.errors import UsageError
from vlm.fusion import family_faults
from vlm.linear_cross_entropy import check_head
from vlm.model import VLMModel, build_language_model
from vlm.processing import VLMImageProcessor, VLMProcessor, complete_tokenizer
from vlm.quantization import is_quantized
from vlm.saving import read
from vlm.vision import VisionTower, build_tower

from .config import Config
from .config_model import RopeScaling, TextSizes, VisionSizes
from .tokenizer import as_transformers, train_bpe, training_texts

CAPTION_PROMPT = "Describe the picture."
# A vocabulary of whole tiles is faster in matrix products than one of 4099 tokens.
VOCABULARY_TILE = 64


def build(config: Config) -> tuple[VLMModel, VLMProcessor]:
    """The model, in float32 on the CPU, and its processor.

    Random weights depend on `config.seed` alone; the global random state is left as it was. With several ranks, rank 0
    trains the tokenizer and the others receive it. Raises UsageError for what cannot be built.
    """
    if config.model.path is not None:
        model, processor = read(config.model.path, dtype="float32")
        if is_quantized(model):
            raise UsageError(
                f"model.path {config.model.path} is quantized and its weights cannot learn; train the full-precision model, "
                "with model.quantize and lora if it shall take as little memory"
            )
        if config.model.rope_scaling is not None:
            model = _longer(model, config.model.rope_scaling)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model, processor = _from_parts(config)
    _check_objectives(config, model)
    if any(stage.matching_weight for stage in config.stages):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model.add_matching_head()
    return model, processor


def _from_parts(config: Config) -> tuple[VLMModel, VLMProcessor]:
    vision_config, vision = build_vision(config.model.vision)
    language_model, tokenizer = _build_text(config)
    image_processor = VLMImageProcessor(**vision.preprocess)
    processor = VLMProcessor(image_processor, tokenizer, caption_prompt=CAPTION_PROMPT)
    model_config = VLMConfig(
        vision=vision_config,
        text_config=copy.deepcopy(language_model.config),  # a composite's configuration resets its parts' attention
        adapter=config.model.adapter.model_dump(),
        embedding_dim=config.model.embedding_dim,
        image_token_id=processor.image_token_id,
        mask_token_id=processor.mask_token_id,
    )
    return VLMModel(model_config, vision=vision, language_model=language_model), processor


def _check_objectives(config: Config, model: VLMModel) -> None:
    if any(stage.objective != "contrastive" for stage in config.stages):
        check_head(model.language_model)
    if model.config.reading == "causal":
        return
    for index, stage in enumerate(config.stages):
        if stage.objective in ("joint", "clm"):
            family = model.config.text_config.model_type
            raise UsageError(
                f"stages.{index}: objective {stage.objective} writes text, and family {family} only reads it; "
                "use contrastive or mlm, or a decoder family"
            )


# Vision


def build_vision(spec: str | VisionSizes | None) -> tuple[dict[str, Any], VisionTower]:
    """A tower of timm or open_clip: its `VisionConfig` fields, from which it can be rebuilt, and the tower itself."""
    if isinstance(spec, str) and not spec.startswith(("timm:", "open_clip:")):
        return _saved_tower(Path(spec))
    sizes = VisionSizes(name=spec, pretrained=True) if isinstance(spec, str) else spec
    assert sizes is not None
    name, _, tag = sizes.name.partition("/") if sizes.name.startswith("open_clip:") else (sizes.name, "", "")
    fields = {
        "name": name,
        "image_size": sizes.image_size,
        "kwargs": {**_timm_sizes(sizes), **sizes.options},
        "stem": sizes.stem,
    }
    return fields, _tower(fields, (tag or sizes.pretrained) if sizes.pretrained else False)


def _timm_sizes(sizes: VisionSizes) -> dict[str, int]:
    spelled = {"patch_size": sizes.patch_size, "embed_dim": sizes.width, "depth": sizes.depth, "num_heads": sizes.heads}
    given = {name: value for name, value in spelled.items() if value is not None}
    if given and not sizes.name.startswith("timm:"):
        raise UsageError(f"{sizes.name} takes its sizes from its name; remove {', '.join(given)}, or use a timm: name")
    return given


def _saved_tower(folder: Path) -> tuple[dict[str, Any], VisionTower]:
    """A folder as timm saves it: `config.json`, which names the architecture, and `model.safetensors`."""
    if not folder.is_dir():
        raise UsageError(f"vision {folder} is neither timm:NAME, open_clip:NAME nor a folder; write one of them")
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = f"timm:{saved['architecture']}"
    except (OSError, ValueError, KeyError):
        raise UsageError(
            f"vision folder {folder} has no config.json that names an architecture; save it with timm"
        ) from None
    fields = {"name": name, "kwargs": saved.get("model_args") or {}}
    return fields, _tower(fields, str(folder))


def _tower(fields: dict[str, Any], pretrained: bool | str) -> VisionTower:
    try:
        return build_tower(VisionConfig.from_dict(fields), pretrained)
    except (AssertionError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"vision tower {fields['name']} cannot be built: {_first_line(error)}") from error


# Text


def _build_text(config: Config) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    spec = config.model.text
    if isinstance(spec, str):
        return pretrained_text(spec, config.model.rope_scaling)
    assert spec is not None
    tokenizer = complete_tokenizer(_tokenizer_from_scratch(config, spec.positions))
    text_config = family_config(spec, tokenizer)
    if config.model.rope_scaling is not None:
        scale_rope(text_config, config.model.rope_scaling)
    return build_language_model(VLMConfig(text_config=text_config)), tokenizer


def pretrained_text(
    source: str, rope_scaling: RopeScaling | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A language model and its tokenizer by hub id or path, with the special tokens that it lacked.

    Its embeddings grow where those tokens need it; they are never cut.
    """
    try:
        text_config = AutoConfig.from_pretrained(source)
        tokenizer = complete_tokenizer(AutoTokenizer.from_pretrained(source))
        if rope_scaling is not None:
            scale_rope(text_config, rope_scaling)
        model = _auto_class(text_config).from_pretrained(source, config=text_config, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UsageError(f"language model {source} cannot be read: {_first_line(error)}") from error
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=VOCABULARY_TILE)
    return model, tokenizer


def scale_rope(text_config: PreTrainedConfig, scaling: RopeScaling) -> None:
    """Stretch a configuration's rotary positions, in place; its longest text grows by `scaling.factor`.

    Where layers of several kinds have positions of their own, those of full attention are stretched: the others never see
    far. Raises UsageError for a family without rotary positions, and for positions that are stretched already.
    """
    every = getattr(text_config, "rope_parameters", None) or {}
    rope = every.get("full_attention", every)
    if "rope_theta" not in rope:
        raise UsageError(
            f"model.rope_scaling: family {text_config.model_type} has no rotary positions to stretch; remove it, or choose "
            "another family"
        )
    if rope["rope_type"] != "default":
        raise UsageError(
            f"model.rope_scaling: the positions of this {text_config.model_type} are stretched already "
            f"({rope['rope_type']} × {rope.get('factor')}); remove it"
        )
    longest = text_config.max_position_embeddings
    rope |= {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type != "linear":
        rope["original_max_position_embeddings"] = longest
        if hasattr(text_config, "original_max_position_embeddings"):
            text_config.original_max_position_embeddings = longest  # Phi-3 keeps it here, and reads it from here
    if scaling.type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    text_config.max_position_embeddings = round(longest * scaling.factor)


def _longer(model: VLMModel, scaling: RopeScaling) -> VLMModel:
    """The same weights under stretched positions, whose frequencies are computed when a model is built."""
    config = copy.deepcopy(model.config)
    scale_rope(config.text_config, scaling)
    with torch.random.fork_rng(devices=[]):
        longer = VLMModel(config)
    longer.load_state_dict(model.state_dict())
    return longer


def _auto_class(text_config: PreTrainedConfig) -> Any:
    masked = VLMConfig(text_config=text_config).reading == "masked"
    return AutoModelForMaskedLM if masked else AutoModelForCausalLM


def family_config(sizes: TextSizes, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The family's own configuration class with `sizes` under the names that it uses.

    Raises UsageError for sizes that contradict each other, and for a family that cannot take them.
    """
    _check_heads(sizes)
    defaults = _family_defaults(sizes.family)
    _check_options(sizes, defaults)
    values = _as_spelled(sizes, tokenizer, defaults) | sizes.options
    with family_faults(sizes.family):
        text_config = AutoConfig.for_model(sizes.family, **values)
        language = text_config.get_text_config()
    _check_sizes_arrived(sizes, language)
    return text_config


def _check_heads(sizes: TextSizes) -> None:
    if sizes.width % sizes.heads:
        raise UsageError(f"model.text: width {sizes.width} is no multiple of heads {sizes.heads}; change one")
    if sizes.kv_heads is not None and sizes.heads % sizes.kv_heads:
        raise UsageError(f"model.text: heads {sizes.heads} is no multiple of kv_heads {sizes.kv_heads}; change one")


def _check_options(sizes: TextSizes, defaults: PreTrainedConfig) -> None:
    if unknown := [name for name in sizes.options if not hasattr(defaults, name)]:
        near = difflib.get_close_matches(unknown[0], defaults.to_dict(), n=1)
        mend = f"did you mean {near[0]}?" if near else f"see {type(defaults).__name__}"
        raise UsageError(f"model.text.options.{unknown[0]} is no setting of family {sizes.family}; {mend}")


def _as_spelled(sizes: TextSizes, tokenizer: PreTrainedTokenizerBase, defaults: PreTrainedConfig) -> dict[str, Any]:
    inner = round(sizes.feed_forward * sizes.width)
    values: dict[str, Any] = {
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.heads,
        "max_position_embeddings": sizes.positions,
        "vocab_size": -(-len(tokenizer) // VOCABULARY_TILE) * VOCABULARY_TILE,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    optional = {
        "num_key_value_heads": sizes.kv_heads or sizes.heads,
        "head_dim": sizes.width // sizes.heads,
        "word_embed_proj_dim": sizes.width,
        "embedding_size": sizes.width,
        "cls_token_id": None,
        "sep_token_id": None,
        "intermediate_size": inner,
        "ffn_dim": inner,
        "n_inner": inner,
        "hidden_dim": inner,
        "moe_intermediate_size": inner,
    }
    # Not all that the configuration has: Falcon works out its head_dim in a property, which takes no value.
    known = defaults.to_dict().keys() | defaults.attribute_map.keys()
    return values | {name: value for name, value in optional.items() if name in known}


def _check_sizes_arrived(sizes: TextSizes, language: PreTrainedConfig) -> None:
    """A family of several parts keeps each part's sizes in a configuration of its own, and passes over these."""
    found = getattr(language, "hidden_size", None), getattr(language, "num_hidden_layers", None)
    if found == (sizes.width, sizes.depth):
        return
    mend = "give them under their own names in model.text.options, or choose another family"
    if language.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and language.model_type != sizes.family:
        mend = f"choose family {language.model_type}, its part that reads text"
    raise UsageError(
        f"model.text: family {sizes.family} would have hidden size {found[0]} and {found[1]} layers where width {sizes.width} "
        f"and depth {sizes.depth} are asked for; {mend}"
    )


def _family_defaults(family: str) -> PreTrainedConfig:
    if family not in CONFIG_MAPPING_NAMES:
        near = difflib.get_close_matches(family, CONFIG_MAPPING_NAMES, n=1)
        mend = f"did you mean {near[0]}?" if near else "write a model_type such as qwen3, llama, gpt2 or bert"
        raise UsageError(f"model.text.family {family!r} is no family of transformers; {mend}")
    with family_faults(family):
        return AutoConfig.for_model(family)


def _tokenizer_from_scratch(config: Config, longest: int) -> PreTrainedTokenizerBase:
    if config.model.tokenizer.path is not None:
        try:
            return AutoTokenizer.from_pretrained(config.model.tokenizer.path)
        except (OSError, ValueError) as error:
            raise UsageError(f"tokenizer {config.model.tokenizer.path} cannot be read: {_first_line(error)}") from error
    sources = [source.path for source in config.data.train]
    vocab_size = config.model.tokenizer.vocab_size
    bpe = _on_first_rank(lambda: train_bpe(training_texts(sources, CAPTION_PROMPT), vocab_size))
    return as_transformers(bpe, longest)


def _on_first_rank(make: Callable[[], str]) -> str:
    """What `make` returns on rank 0, or its error, on every rank: no rank may wait for one that has failed."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return make()
    box: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            box[0] = make()
        except Exception as error:
            box[1] = error
    torch.distributed.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
