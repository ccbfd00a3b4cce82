"""Low-rank updates of a language model's linear layers (LoRA, Hu et al. 2021), by peft: put in, saved, loaded, merged.

Knows which layers take an update and what an adapter folder holds. Knows nothing of training or of who trains what.

An adapter folder is what peft reads (`adapter_config.json`, `adapter_model.safetensors`, names relative to the language
model), and beside it `trained.safetensors` with whatever else of the composite was trained, and `base.json`, which names
the model that all this belongs to by the hash of its weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from vlm.errors import RunError, UsageError
from vlm.files import atomic_folder
from vlm.quantization import is_quantized

LANGUAGE = "language_model."
WEIGHTS, OTHERS, BASE = "adapter_model.safetensors", "trained.safetensors", "base.json"


def add_lora(
    language_model: PreTrainedModel,
    r: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: list[str] | None = None,
) -> None:
    """Put updates of rank `r` beside linear layers, in place; the language model itself is frozen.

    alpha: the updates are scaled by alpha / r; None is 2 r. targets: names (`q_proj`) or patterns
    (`*.layers.0.*`) of linear layers; None is all but the head. A new update is zero, so the model stays what it was.
    Raises UsageError for a target that matches nothing.
    """
    config = LoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=_matching(linear_layers(language_model), targets),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in language_model.modules()),
    )
    inject_adapter_in_model(config, language_model)


def has_lora(language_model: PreTrainedModel) -> bool:
    """Whether `add_lora` was called and `merge_lora` not yet."""
    return next(_updated_layers(language_model), None) is not None


def merge_lora(language_model: PreTrainedModel) -> None:
    """Add the updates into the layers they stand beside and take them out, in place; names are as before `add_lora`.

    Raises UsageError for a quantized base, whose rounding would swallow most of an update.
    """
    if is_quantized(language_model):
        raise UsageError(
            "a LoRA update does not merge into a quantized model, which would round it away; leave it beside, or merge it "
            "into the full-precision model and quantize that"
        )
    for name, layer in list(_updated_layers(language_model)):
        layer.merge(safe_merge=True)
        language_model.set_submodule(name, layer.get_base_layer())
    del language_model.peft_config


def linear_layers(language_model: PreTrainedModel) -> list[str]:
    """Names of the linear layers that may take an update: all but the head."""
    head = language_model.get_output_embeddings()
    return [
        name
        for name, module in language_model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]


def _matching(layers: list[str], targets: list[str] | None) -> list[str]:
    if targets is None:
        return layers
    found: set[str] = set()
    for target in targets:
        matches = {name for name in layers if name.endswith("." + target) or fnmatchcase(name, target)}
        if not matches:
            known = sorted({name.rpartition(".")[2] for name in layers})
            raise UsageError(
                f"lora target {target!r} matches none of {len(layers)} linear layers; they are called {known}"
            )
        found |= matches
    return [name for name in layers if name in found]


def _updated_layers(language_model: PreTrainedModel) -> Iterator[tuple[str, BaseTunerLayer]]:
    for name, module in language_model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


# On disk


def base_hash(weights: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and float32 values of weights, whatever their order."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.numpy().data)
    return digest.hexdigest()


def save_lora(model: Any, folder: str | Path, base: str, trained: Mapping[str, Tensor]) -> None:
    """Write the adapter folder of a composite whose `language_model` has LoRA; it appears whole or not at all.

    base: `base_hash` of the model's weights before the training. trained: whatever else was trained, by name.
    Raises RunError for an empty tensor (a shard of ZeRO-3 that nobody gathered) and where the disk refuses.
    """
    updates = get_peft_model_state_dict(model.language_model)
    tensors = {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in updates.items()}
    others = {name: value.detach().cpu().contiguous() for name, value in trained.items()}
    if empty := [name for name, value in {**tensors, **others}.items() if value.numel() == 0]:
        raise RunError(
            f"{len(empty)} of {len(tensors) + len(others)} adapter weights are empty, the first {empty[0]}; not saved"
        )
    try:
        with atomic_folder(folder) as fresh:
            save_file(tensors, fresh / WEIGHTS, metadata={"format": "pt"})
            save_file(others, fresh / OTHERS, metadata={"format": "pt"})
            model.language_model.peft_config["default"].save_pretrained(fresh)
            (fresh / BASE).write_text(json.dumps({"sha256": base}) + "\n", "utf-8")
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"cannot write the adapter to {folder}: {error}; free the disk or choose another place"
        ) from error


def load_lora(model: Any, folder: str | Path) -> None:
    """Put a saved adapter folder onto the composite it was trained from, in place.

    Raises UsageError if `model` is another one, or if weights are missing or left over.
    """
    folder = Path(folder)
    try:
        base = json.loads((folder / BASE).read_text("utf-8"))["sha256"]
        config = LoraConfig.from_pretrained(folder)
        tensors, others = load_file(folder / WEIGHTS), load_file(folder / OTHERS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UsageError(f"{folder} is no adapter folder ({error}); give the OUT/adapter of a run with lora") from None
    found = base_hash(model.state_dict())
    if found != base:
        raise UsageError(
            f"adapter {folder} belongs to a model with weights {base[:12]}…, this one has {found[:12]}…; "
            "load it onto the model it was trained from"
        )
    inject_adapter_in_model(config, model.language_model)
    wanted = set(get_peft_model_state_dict(model.language_model))
    updates = {name.removeprefix("base_model.model."): value for name, value in tensors.items()}
    if wanted != set(updates):
        raise UsageError(
            f"adapter {folder} holds {len(updates)} updates and the model takes {len(wanted)}; "
            f"they differ in {sorted(wanted ^ set(updates))[0]}"
        )
    named = {LANGUAGE + name.replace(".weight", ".default.weight"): value for name, value in updates.items()} | others
    try:
        unexpected = model.load_state_dict(named, strict=False).unexpected_keys
    except RuntimeError as error:
        shapes = str(error).strip().splitlines()[-1].strip()
        raise UsageError(f"adapter {folder} has weights of other shapes ({shapes}); fetch or train it again") from None
    if unexpected:
        raise UsageError(f"adapter {folder} holds {unexpected[0]}, which this model has not; load it onto its own base")
