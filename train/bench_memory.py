"""Memory of long texts: the peak of a forward and backward pass, each length in a process of its own.

Knows a small language model with stretched rotary positions and the clm objective. Knows nothing of speed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoConfig

from vlm.benchmark import Row
from vlm.configuration import VLMConfig
from vlm.errors import RunError
from vlm.model import VLMModel

from .build import scale_rope
from .config_model import RopeScaling
from .config_stage import Stage
from .loop import checkpoint_activations
from .objectives import OBJECTIVES, Plan

SHORT, LONG = 4096, 16384
WIDTH, DEPTH, VOCABULARY = 256, 4, 32_768


def rows() -> list[Row]:
    """Peaks of one text of 16 384 tokens beside one of 4 096: all activations kept, and computed anew layer by layer.

    Both peaks hold what does not grow: gradients of the weights, and the logits of one chunk of tokens.
    """
    found = []
    for checkpointed, name in ((False, "activations kept"), (True, "gradient checkpointing")):
        long, short = measured(LONG, checkpointed), measured(SHORT, checkpointed)
        shape = (
            f"{DEPTH} × {WIDTH}, vocabulary {VOCABULARY:,}, yarn × 4, fp32, {long['device']}, above what stood before"
        )
        conditions = f"peak of clm forward and backward on {LONG:,} tokens (ours) and {SHORT:,} (peer), {shape}"
        found.append(Row(f"long text, {name}", long["mib"], short["mib"], "MiB", conditions, target="≤ 4.5"))
    return found


def measured(length: int, checkpointed: bool) -> dict:
    """`peak` in a fresh process, whose allocator has held nothing else."""
    command = [sys.executable, "-m", "vlm.train.bench_memory", str(length), *(["checkpointed"] if checkpointed else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"a text of {length} tokens failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak(length: int, checkpointed: bool) -> dict:
    """MiB that a step on one text of `length` tokens takes above weights and program, and on which device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objective = OBJECTIVES["clm"](small_model().to(device), Stage(objective="clm", steps=1)).train()
    if checkpointed:
        checkpoint_activations(objective.model)
    ids = torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    before = _held(device, "VmRSS", torch.cuda.memory_allocated)
    objective(batch, Plan(length))[0].backward()
    after = _held(device, "VmHWM", torch.cuda.max_memory_allocated)
    return {"mib": (after - before) / 2**20, "device": device.type}


def small_model() -> VLMModel:
    """A language model for 16 384 tokens, with as little of a vision tower as there can be."""
    text = AutoConfig.for_model(
        "qwen3",
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=WIDTH // 64,
        num_key_value_heads=WIDTH // 64,
        head_dim=64,
        max_position_embeddings=SHORT,
    )
    scale_rope(text, RopeScaling(type="yarn", factor=LONG / SHORT))
    tower = {"patch_size": 16, "embed_dim": 64, "depth": 1, "num_heads": 1}
    vision = {"name": "timm:vit_tiny_patch16_224", "image_size": (32, 32), "kwargs": tower}
    return VLMModel(VLMConfig(vision=vision, text_config=text, adapter={"every": DEPTH}, image_token_id=3))


def _held(device: torch.device, field: str, on_gpu) -> int:
    """Bytes of the device's memory, or of this process's by its name in /proc."""
    if device.type == "cuda":
        return on_gpu()
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = [line.split()[1] for line in lines if line.startswith(field + ":")]
    return int(kib) * 1024


if __name__ == "__main__":
    print(json.dumps(peak(int(sys.argv[1]), checkpointed="checkpointed" in sys.argv[2:])))
