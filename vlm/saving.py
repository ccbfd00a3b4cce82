"""A model on disk: one folder that holds weights, processor, decoding defaults and a model card.

Knows what such a folder holds, and how to tell a whole one from a broken one or one of another kind. Knows nothing of
training state, devices, or what the model is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import logging

from vlm.configuration import VLMConfig
from vlm.errors import RunError, UsageError
from vlm.files import atomic_folder
from vlm.model import VLMModel
from vlm.processing import VLMProcessor
from vlm.quantization import parameter_count
from vlm.tensor_parallel import settings

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}

MODEL_CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [vision-language, cross-attention]
---
# {name}

A vision-language model: vision tower `{vision}` and language model `{text}`, linked by {adapters} gated cross-attention
adapters; {parameters:.1f} M parameters, saved in {dtype}.

```python
import vlm

model = vlm.load("{name}")
{usage}
```
"""
CAUSAL_USAGE = 'model.caption("picture.jpg")\nmodel.answer("picture.jpg", "What colour is it?")'
MASKED_USAGE = 'model.fill_mask("The <mask> is shining.")\nmodel.embed_image("picture.jpg")'


def save(model: VLMModel, processor: VLMProcessor, folder: str | Path) -> None:
    """Write a model folder; it appears whole or not at all. Raises RunError where the disk refuses."""
    folder = Path(folder)
    try:
        with atomic_folder(folder) as fresh, _quiet():
            model.save_pretrained(fresh)
            processor.save_pretrained(fresh)
            if model.config.reading == "causal":
                decoding_defaults(processor).save_pretrained(fresh)
            (fresh / "README.md").write_text(_model_card(model, folder.name), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"cannot write the model to {folder}: {_first_line(error)}; free the disk or choose another place"
        ) from error


def read(
    source: str | Path, dtype: str | torch.dtype = "auto", tensor_parallel: int = 1
) -> tuple[VLMModel, VLMProcessor]:
    """Read a model folder or a hub id, on the CPU. dtype "auto": as saved.

    tensor_parallel: more than 1 reads this process's part alone (see `vlm.tensor_parallel`), onto its device; so many are in
    the process group, and all of them read.
    Raises UsageError for a folder that is missing, of another kind, or broken.
    """
    _check_kind(source)
    cut = settings(config_of(source), tensor_parallel) if tensor_parallel > 1 else {}
    try:
        with _quiet():
            model, report = VLMModel.from_pretrained(source, dtype=_dtype(dtype), output_loading_info=True, **cut)
            processor = VLMProcessor.from_pretrained(source)
            # How it was fetched; transformers 5.24 would save that with it.
            for how in ("is_local", "local_files_only"):
                processor.tokenizer.init_kwargs.pop(how, None)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UsageError(
            f"the model in {source} cannot be read: {_first_line(error)}; save or fetch it again"
        ) from error
    for problem, keys in (("lacks", report["missing_keys"]), ("holds unknown", report["unexpected_keys"])):
        if keys:
            raise UsageError(
                f"the model in {source} {problem} weights, {len(keys)} of them, the first {min(keys)}; save or fetch it again"
            )
    return model, processor


def config_of(source: str | Path) -> VLMConfig:
    """The configuration of a model folder or a hub id. Raises UsageError as `read`."""
    _check_kind(source)
    try:
        return VLMConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the model in {source} cannot be read: {_first_line(error)}; save or fetch it again"
        ) from error


def decoding_defaults(processor: VLMProcessor) -> GenerationConfig:
    """Which tokens end an answer and which fill up a batch; `<image>` is never said, for it would stand for no picture."""
    return GenerationConfig(
        eos_token_id=processor.end_token_ids,
        pad_token_id=processor.tokenizer.pad_token_id,
        suppress_tokens=[processor.image_token_id],
    )


def _check_kind(source: str | Path) -> None:
    folder = Path(source)
    is_hub_id = len(folder.parts) == 2 and not folder.parent.is_dir() and not folder.is_absolute()
    if not folder.is_dir() and not is_hub_id:
        raise UsageError(
            f"there is no model folder {source}; give a folder that `vlm train` wrote (OUT/model) or a hub id"
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UsageError(
            f"{source} holds no config.json, so no model; give a folder that `vlm train` wrote (OUT/model)"
        )
    try:
        kind = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"no model can be read from {source}: {_first_line(error)}; give a folder, or a hub id that can be reached"
        ) from error
    if kind != VLMConfig.model_type:
        raise UsageError(
            f"{source} holds a model of another kind ({kind}), not a vlm one; name it in a training config instead (model.text)"
        )


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown; choose auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _model_card(model: VLMModel, name: str) -> str:
    return MODEL_CARD.format(
        name=name,
        vision=model.config.vision_config.name,
        text=model.config.text_config.model_type,
        adapters=len(model.adapters),
        parameters=parameter_count(model) / 1e6,
        dtype=(model.config.quantization or {}).get("scheme") or str(model.dtype).removeprefix("torch."),
        usage=CAUSAL_USAGE if model.config.reading == "causal" else MASKED_USAGE,
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and loading tables: `read` checks by itself and says it in one line."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
