"""Low-rank updates of a composite's linear layers (LoRA, Hu et al. 2021), by peft: put in, saved, loaded, merged.

Knows which layers of a tower take an update and what an adapter folder holds. Knows nothing of training or of who trains
what.

An adapter folder is what peft reads (`adapter_config.json`, `adapter_model.safetensors`, names relative to the language
model), the same for the vision tower in a folder `vision/`, and beside them `trained.safetensors` with whatever else of
the composite was trained, and `base.json`, which names the model that all this belongs to by the hash of its weights, and says
how it turns positions, how it was quantized to be trained, if it was, and where it lay.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from vlm.errors import RunError, UsageError
from vlm.files import atomic_folder
from vlm.packed_linear import unpack
from vlm.quantization import is_quantized, quantize

# Name of a tower -> the attribute of the composite, and the folder that its updates lie in.
TOWERS = {"text": ("language_model", "."), "vision": ("vision", "vision")}
CONFIG, WEIGHTS, OTHERS, BASE = "adapter_config.json", "adapter_model.safetensors", "trained.safetensors", "base.json"
MATCHING = "matching_head."
PREFIX = "base_model.model."  # peft's, before every name in a file


def add_lora(
    model: Any,
    r: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: list[str] | None = None,
    towers: Sequence[str] = ("text",),
    dora: bool = False,
    rslora: bool = False,
) -> None:
    """Put updates of rank `r` beside linear layers of a composite's `towers`, in place; these towers are frozen.

    alpha: the updates are scaled by alpha / r; None is 2 r. rslora: by alpha / √r (Kalajdzievski 2023). dora: length and
    direction of a weight's rows are learned apart (Liu et al. 2024). targets: names (`q_proj`) or patterns
    (`*.layers.0.*`), within a tower, of linear layers; None is all but the head. A new update is zero, so the model stays
    what it was. Raises UsageError for a target that matches nothing, and for a tower that none matches.
    """
    matched = _matching({tower: linear_layers(model, tower) for tower in towers}, targets)
    for tower, names in matched.items():
        part = _part(model, tower)
        config = LoraConfig(
            r=r,
            lora_alpha=2 * r if alpha is None else alpha,
            lora_dropout=dropout,
            target_modules=names,
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in part.modules()),
            use_dora=dora,
            use_rslora=rslora,
        )
        inject_adapter_in_model(config, part)


def has_lora(model: Any) -> bool:
    """Whether `add_lora` was called and `merge_lora` not yet."""
    return bool(_updated_towers(model))


def merge_lora(model: Any, keep: bool = False) -> None:
    """Add the updates into the layers they stand beside and take them out, in place; names are as before `add_lora`.

    keep: leave them beside the layers, for `unmerge_lora` to take them off again. Raises UsageError for a quantized base,
    whose rounding would swallow most of an update.
    """
    if is_quantized(model):
        raise UsageError(
            "a LoRA update does not merge into a quantized model, which would round it away; leave it beside, or merge it "
            "into the full-precision model and quantize that"
        )
    unpack(model)
    for tower in _updated_towers(model):
        part = _part(model, tower)
        for _, layer in _updated_layers(part):
            layer.merge(safe_merge=True)
    if not keep:
        remove_lora(model)


def remove_lora(model: Any) -> None:
    """Take the updates out, in place, with what they have learned; names are as before `add_lora`."""
    for tower in _updated_towers(model):
        part = _part(model, tower)
        for name, layer in list(_updated_layers(part)):
            part.set_submodule(name, layer.get_base_layer())
        del part.peft_config


def unmerge_lora(model: Any) -> None:
    """Take the updates that `merge_lora(keep=True)` added off again, to within rounding."""
    for tower in _updated_towers(model):
        for _, layer in _updated_layers(_part(model, tower)):
            layer.unmerge()


def linear_layers(model: Any, tower: str = "text") -> list[str]:
    """Names, within the tower, of the linear layers that may take an update: all but the language model's head.

    Of the vision tower those that a picture passes: some towers read a layer's weight past the layer, or have layers
    that are never used, and an update beside these would learn nothing.
    """
    part, head = _part(model, tower), model.get_output_embeddings()
    layers = {
        name: module
        for name, module in part.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }
    passed = set(layers) if tower == "text" else _passed(part, layers)
    return [name for name in layers if name in passed]


def _passed(tower: Any, layers: Mapping[str, nn.Module]) -> set[str]:
    """Which of the layers a picture passes."""
    passed: set[str] = set()
    hooks = [layer.register_forward_hook(lambda *_, name=name: passed.add(name)) for name, layer in layers.items()]
    weight, training = next(tower.parameters()), tower.training
    tower.eval()  # a batch norm would learn from the black picture
    try:
        with torch.no_grad():
            tower(torch.zeros(1, 3, *tower.image_size, dtype=weight.dtype, device=weight.device))
    finally:
        tower.train(training)
        for hook in hooks:
            hook.remove()
    return passed


def _matching(layers: Mapping[str, list[str]], targets: list[str] | None) -> dict[str, list[str]]:
    """The layers of each tower that a target names."""
    found: dict[str, set[str]] = {tower: set() if targets else set(names) for tower, names in layers.items()}
    every = [name for names in layers.values() for name in names]
    known = sorted({name.rpartition(".")[2] for name in every})
    for target in targets or ():
        matches = {
            tower: {name for name in names if name.endswith("." + target) or fnmatchcase(name, target)}
            for tower, names in layers.items()
        }
        if not any(matches.values()):
            raise UsageError(
                f"lora target {target!r} matches none of {len(every)} linear layers; they are called {known}"
            )
        for tower, names in matches.items():
            found[tower] |= names
    for tower, chosen in found.items():
        if not chosen:
            raise UsageError(
                f"lora targets {targets} match none of {len(layers[tower])} linear layers of tower {tower}; they are called "
                f"{sorted({name.rpartition('.')[2] for name in layers[tower]})}"
            )
    return {tower: [name for name in names if name in found[tower]] for tower, names in layers.items()}


def _part(model: Any, tower: str) -> Any:
    return getattr(model, TOWERS[tower][0])


def _updated_towers(model: Any) -> list[str]:
    return [tower for tower in TOWERS if next(_updated_layers(_part(model, tower)), None) is not None]


def _updated_layers(part: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    for name, module in part.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def _updates(part: nn.Module) -> dict[str, str]:
    """Name of an update in a file -> its name in the tower, which tells the adapters of a model apart."""
    names = [name for name in part.state_dict() if ".lora_" in name]
    return {PREFIX + name.replace(".default.weight", _ending(name)): name for name in names}


def _ending(name: str) -> str:
    return "" if "lora_magnitude_vector" in name else ".weight"


# On disk


def base_hash(weights: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and float32 values of weights, whatever their order.

    Without those of the matching head: training puts one into a base that had none, and what it learns is the adapter's.
    """
    digest = hashlib.sha256()
    for name in sorted(name for name in weights if not name.startswith(MATCHING)):
        value = weights[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.numpy().data)
    return digest.hexdigest()


def save_lora(
    model: Any,
    folder: str | Path,
    base: str,
    trained: Mapping[str, Tensor],
    quantization: Mapping[str, Any] | None = None,
    start: Path | None = None,
) -> None:
    """Write the adapter folder of a composite with LoRA; it appears whole or not at all.

    base: `base_hash` of the model's weights before the training. trained: whatever else was trained, by name.
    quantization: arguments of `quantize`, if the base was full-precision and quantized for the training. start: the folder
    of the base, for those who look for it.
    Raises RunError for an empty tensor (a shard of ZeRO-3 that nobody gathered) and where the disk refuses.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    for tower in _updated_towers(model):
        values = _part(model, tower).state_dict()
        tensors[tower] = {saved: _on_cpu(values[name]) for saved, name in _updates(_part(model, tower)).items()}
    others = {name: _on_cpu(value) for name, value in trained.items()}
    every = [pair for held in (*tensors.values(), others) for pair in held.items()]
    if empty := [name for name, value in every if value.numel() == 0]:
        raise RunError(f"{len(empty)} of {len(every)} adapter weights are empty, the first {empty[0]}; not saved")
    try:
        with atomic_folder(folder) as fresh:
            for tower, updates in tensors.items():
                place = fresh / TOWERS[tower][1]
                place.mkdir(exist_ok=True)
                save_file(updates, place / WEIGHTS, metadata={"format": "pt"})
                _part(model, tower).peft_config["default"].save_pretrained(place)
            save_file(others, fresh / OTHERS, metadata={"format": "pt"})
            told = {"sha256": base, "rope": _rope(model), "quantization": quantization}
            if start is not None:
                told["start"] = os.path.relpath(start, folder)
            (fresh / BASE).write_text(json.dumps(told) + "\n", "utf-8")
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"cannot write the adapter to {folder}: {error}; free the disk or choose another place"
        ) from error


def _rope(model: Any) -> Any:
    """The rotary positions of a composite's language model, as JSON would give them back; None where it has none."""
    return json.loads(json.dumps(getattr(model.config.text_config, "rope_parameters", None)))


def _on_cpu(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous()


def load_lora(model: Any, folder: str | Path) -> None:
    """Put a saved adapter folder onto the composite it was trained from, in place.

    One that was trained beside a quantized base quantizes it in the same way. Raises UsageError if `model` is another one,
    or if weights are missing or left over.
    """
    folder = Path(folder)
    try:
        told = json.loads((folder / BASE).read_text("utf-8"))
        base, quantization = told["sha256"], told.get("quantization")
        rope = told.get("rope", _rope(model))  # of which adapters of earlier runs say nothing
        own = Path(folder, told["start"]).resolve() if "start" in told else "its own base"
        others = load_file(folder / OTHERS)
        places = {tower: folder / place for tower, (_, place) in TOWERS.items() if _holds_updates(folder / place)}
        configs = {tower: LoraConfig.from_pretrained(place) for tower, place in places.items()}
        tensors = {tower: load_file(place / WEIGHTS) for tower, place in places.items()}
        if not places:
            raise ValueError(f"no {CONFIG}")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UsageError(f"{folder} is no adapter folder ({error}); give the OUT/adapter of a run with lora") from None
    found = base_hash(model.state_dict())
    if found != base:
        raise UsageError(
            f"adapter {folder} belongs to a model with weights {base[:12]}…, this one has {found[:12]}…; load it onto {own}"
        )
    if _rope(model) != rope:
        raise UsageError(
            f"adapter {folder} was trained with rotary positions {rope}, this model has {_rope(model)}; load it onto "
            f"{own}"
        )
    if quantization is not None:
        quantize(model, **quantization)
    named: dict[str, Tensor] = {}
    for tower, config in configs.items():
        inject_adapter_in_model(config, _part(model, tower))
        wanted, updates = _updates(_part(model, tower)), tensors[tower]
        if set(wanted) != set(updates):
            raise UsageError(
                f"adapter {folder} holds {len(updates)} updates and the model takes {len(wanted)}; "
                f"they differ in {sorted(set(wanted) ^ set(updates))[0].removeprefix(PREFIX)}"
            )
        named |= {f"{TOWERS[tower][0]}.{wanted[saved]}": value for saved, value in updates.items()}
    if any(name.startswith(MATCHING) for name in others):
        model.add_matching_head()
    try:
        unexpected = model.load_state_dict(named | others, strict=False).unexpected_keys
    except RuntimeError as error:
        shapes = str(error).strip().splitlines()[-1].strip()
        raise UsageError(f"adapter {folder} has weights of other shapes ({shapes}); fetch or train it again") from None
    if unexpected:
        raise UsageError(f"adapter {folder} holds {unexpected[0]}, which this model has not; load it onto its own base")


def _holds_updates(place: Path) -> bool:
    return (place / CONFIG).is_file() or (place / WEIGHTS).is_file()
