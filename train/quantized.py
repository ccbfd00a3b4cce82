"""A language model held in int8 or int4 while LoRA and the adapters learn beside it (QLoRA, Dettmers et al. 2023).

Knows which layers that concerns, what cannot be trained with them, and where their full-precision weights lie. Knows nothing of
rounding, engines or steps. The weights in few bits are buffers: each rank has them whole under every ZeRO stage, and no
optimizer, gradient or master copy belongs to them. In full precision they are on disk alone until the stage ends.
"""

from __future__ import annotations

from vlm.errors import UsageError
from vlm.model import VLMModel
from vlm.quantization import chosen, quantize

from .checkpoint import Checkpoints
from .config import Config
from .objectives import OBJECTIVES
from .optimization import shall_train


def check_quantized(config: Config, model: VLMModel) -> None:
    """Raise UsageError for a stage that wants layers to learn which will be quantized.

    model: in full precision, without LoRA.
    """
    scheme = config.model.quantize
    if scheme is None:
        return
    if config.compile:
        raise UsageError(f"model.quantize {scheme} runs uncompiled, and compile is on; change one")
    layers = [name for name, _ in chosen(model, base=True)]
    for number, stage in enumerate(config.stages):
        objective = OBJECTIVES[stage.objective](model, stage)
        learning = [name for name in layers if shall_train(f"{name}.weight", objective, stage)]
        if learning:
            raise UsageError(
                f"stages.{number} trains {len(learning)} of {len(layers)} layers that model.quantize {scheme} freezes, the "
                f"first {learning[0]}; give it lora: {{r: 8}}, or freeze: [language_model]"
            )


def quantize_base(config: Config, model: VLMModel) -> None:
    """Bring the model that a stage starts from into few bits, in place, where the config asks for it."""
    if config.model.quantize is not None:
        quantize(model, config.model.quantize, base=True)


def original(config: Config, checkpoints: Checkpoints, stage: int) -> VLMModel | None:
    """The model that `stage` started from, read again in full precision, where it is held in fewer bits."""
    return None if config.model.quantize is None else checkpoints.read_start(stage)[0]
