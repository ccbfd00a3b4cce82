"""`vlm bench train --against padded`: samples that share rows beside samples in rows of their own.

Knows what to measure: training steps of both on the same samples, in turns, and that they lose the same. Knows nothing of
how rows are packed.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import count

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config

from vlm.benchmark import Row, interleaved, seconds
from vlm.configuration import VLMConfig
from vlm.model import VLMModel
from vlm.processing import VLMImageProcessor, VLMProcessor
from vlm.samples import Sample

from .batches import READERS, Batch, Reader
from .config_stage import Stage
from .objectives import OBJECTIVES, Objective, Plan
from .packing import Example

SIDE = 224
VOCABULARY = 32_000
# Words of a caption, each a token: as skewed as those of the web, half of them below 12.
MEDIAN, SPREAD, SHORTEST, LONGEST = 12, 0.6, 5, 60
LENGTHS = f"{SHORTEST}–{LONGEST} tokens, log-normal, median {MEDIAN}"


def bench_packing(batch: int = 32, rounds: int = 3, depth: int = 12, width: int = 768) -> list[Row]:
    """Tokens a second and losses of training steps, packed beside padded, as rows of a benchmark.

    Steps of `batch` samples: forward, backward and AdamW in bf16 autocast, each on a fresh batch that both sides see. The
    vision tower takes the same time on both, so joint training is measured with it and, as from pretrained towers, frozen.
    The losses are in fp32. depth, width: of the language model; every second layer looks at a ViT-S/16.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, processor = _model(depth, width).to(device), _processor()
    shapes = f"{depth} × {width} text, every 2nd crossed, ViT-S/16, batch {batch}, bf16, {device.type}"
    rows = []
    for objective, frozen in (("joint", False), ("joint", True), ("clm", False)):
        model.vision.requires_grad_(not frozen)
        name = f"{objective}, tokens a second" + (", vision tower frozen" if frozen else "")
        target = "≥ 1.8" if objective == "joint" else ""
        rows.append(_speed(name, _Sides(model, processor, objective), batch, rounds, target, f"{LENGTHS}; {shapes}"))
    equal = _Sides(model, processor, "clm", equal=True)
    rows.append(_speed("clm, tokens a second", equal, batch, rounds, "", f"{LONGEST} tokens each; {shapes}"))
    for objective in ("joint", "clm"):
        both = _Sides(model.float(), processor, objective)
        rows.append(_losses(objective, both, batch, f"{LENGTHS}; {shapes.replace('bf16', 'fp32')}"))
    return rows


class _Sides:
    """One objective on one model, and the readers of both sides: packed and padded."""

    def __init__(self, model: VLMModel, processor: VLMProcessor, objective: str, equal: bool = False) -> None:
        self.equal = equal
        self.packed, self.padded = (
            Stage(objective=objective, steps=1, pack=pack, max_tokens=1024)  # type: ignore[arg-type]
            for pack in (True, False)
        )
        self.objective: Objective = OBJECTIVES[objective](model, self.packed)
        self.device = model.device
        self._readers = {
            stage.pack: READERS[objective](processor, stage, stage.max_tokens, True)
            for stage in (self.packed, self.padded)
        }

    def reader(self, pack: bool) -> Reader:
        return self._readers[pack]

    def examples(self, number: int, batch: int) -> list[Example]:
        """The `number`-th batch's, the same for both sides."""
        rng = np.random.default_rng(number)
        lengths = rng.lognormal(np.log(MEDIAN), SPREAD, batch).clip(SHORTEST, LONGEST).astype(int)
        lengths = np.full(batch, LONGEST) if self.equal else lengths
        captions = [" ".join(f"w{word}" for word in rng.integers(0, VOCABULARY - 300, length)) for length in lengths]
        return [
            self.reader(True).example(Sample(str(index), (_picture(index),), caption), rng)
            for index, caption in enumerate(captions)
        ]

    def batch(self, examples: Sequence[Example], pack: bool) -> Batch:
        made = self.reader(pack).collate(examples)
        return {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in made.items()}


def _speed(name: str, sides: _Sides, batch: int, rounds: int, target: str, conditions: str) -> Row:
    trained = [p for p in sides.objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)  # as `make_optimizer` makes it

    def step(examples: list[Example], pack: bool) -> None:
        made = sides.batch(examples, pack)
        with torch.autocast(sides.device.type, torch.bfloat16):
            loss, _ = sides.objective(made, Plan(sides.objective.targets(made)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if sides.device.type == "cuda":
            torch.cuda.synchronize()

    def rate(pack: bool, numbers: count) -> float:
        examples = sides.examples(next(numbers), batch)
        return sum(len(example.ids) for example in examples) / seconds(lambda: step(examples, pack))

    ours, theirs = count(), count()
    warm = sides.examples(0, batch)
    step(warm, True)
    step(warm, False)
    packed, padded = interleaved(lambda: rate(True, ours), lambda: rate(False, theirs), rounds)
    areas = [sides.batch(warm, pack)["input_ids"].numel() for pack in (False, True)]
    return Row(name, packed, padded, "token/s", f"{conditions}; area {areas[0] / areas[1]:.2f} × smaller", target)


def _losses(name: str, sides: _Sides, batch: int, conditions: str) -> Row:
    examples = sides.examples(0, batch)
    packed, padded = (sides.batch(examples, pack) for pack in (True, False))
    plan = Plan(sides.objective.targets(padded))
    with torch.no_grad():
        loss, expected = (float(sides.objective(made, plan)[0]) for made in (packed, padded))
    difference = abs(loss - expected) / abs(expected)
    return Row(f"{name}, difference of losses", difference, None, "relative", conditions, "≤ 1e-4", True)


def _model(depth: int, width: int) -> VLMModel:
    torch.manual_seed(0)
    heads = max(1, width // 64)
    text = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
    )
    vision = {"name": "timm:vit_small_patch16_224", "image_size": (SIDE, SIDE)}
    adapter = {"every": 2, "gate_init": 0.5, "qk_norm": True}
    # Plain products: faster for short rows on CPUs, see `CrossAttention`.
    attention = "sdpa" if torch.cuda.is_available() else "eager"
    model = VLMModel(VLMConfig(vision=vision, text_config=text, adapter=adapter, image_token_id=3, mask_token_id=2))
    model.set_attn_implementation(attention)
    return model.train()


def _processor() -> VLMProcessor:
    known = [
        "<pad>",
        "<eos>",
        "<mask>",
        "<image>",
        "<|user|>",
        "<|assistant|>",
        "<unk>",
        "Describe",
        "the",
        "picture",
        ".",
    ]
    words = [*known, *(f"w{number}" for number in range(VOCABULARY - 300))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", mask_token="<mask>", unk_token="<unk>"
    )
    return VLMProcessor(VLMImageProcessor(input_size=(3, SIDE, SIDE)), tokenizer)


def _picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
