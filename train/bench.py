"""`vlm bench train`: training steps beside those of peers on the same shapes, and what a step holds in memory.

Knows what to measure and against what. Knows nothing of how it is done: ours is built, batched and stepped by what
`vlm train` calls, DeepSpeed's engine included; a peer (`bench_peers.py`) by the plainest loop there is.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlm.benchmark import Row, interleaved, peak_mb, seconds
from vlm.errors import UsageError
from vlm.files import atomic_write
from vlm.settings import annotated_yaml
from vlm.shards import ShardWriter

from . import bench_memory, bench_zero
from .allocator import keep_freed_memory
from .batches import Batch, on_device
from .bench_packing import bench_packing
from .bench_peers import IdeficsPeer, OpenClipPeer
from .build import build
from .checkpoint import Checkpoints
from .config import Config
from .data import RunData
from .log import RunLog
from .loop import Run, start_engine, take_step
from .ranks import join
from .step import prepare
from .stopping import StopSignal

WORDS = """
    a the one two red blue green black white brown man woman dog cat horse bus train pizza table street sign clock beach
    umbrella kite sheep plane truck boat field tree mountain sitting standing riding holding eating walking playing looking
    flying parked on in at near under behind beside with by
""".split()
# Names as timm and the families spell them. Each tower is the peer's, size by size.
VISION = {"name": "timm:vit_small_patch16_224"}
# CLIP's text tower is a GPT-2 with another activation and without dropout.
AS_CLIP = {"activation_function": "gelu", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONTRASTIVE = {
    "vision": VISION,
    "text": {"family": "gpt2", "width": 384, "depth": 6, "heads": 6, "options": {"vocab_size": 49408, **AS_CLIP}},
    "embedding_dim": 384,
}
JOINT = {
    "vision": VISION,
    "text": {
        "family": "llama",
        "width": 768,
        "depth": 12,
        "heads": 12,
        "feed_forward": 8 / 3,
        "options": {"vocab_size": 32000},
    },
    "adapter": {"every": 2},
}
SMALL_PICTURES = CONTRASTIVE | {"vision": VISION | {"image_size": 96}}


def bench_train(against: str | None = None, rounds: int = 3) -> list[Row]:
    """Training beside peers, `rounds` times in turns.

    against: "open_clip", contrastive steps; "idefics", joint steps; "padded", joint and text steps without packing;
    "gradcache", the memory of a contrastive batch that is cut up beside that of a small one; "long", that of a text of
    16 384 tokens beside one of 4 096; "zero", what a rank holds under each ZeRO stage; None: the first three.
    Raises UsageError for another name.
    """
    groups: dict[str, Callable[[], list[Row]]] = {
        "open_clip": partial(bench_open_clip, rounds),
        "idefics": partial(bench_idefics, rounds),
        "padded": partial(bench_packing, rounds=rounds),
        "gradcache": bench_gradcache,
        "long": bench_memory.rows,
        "zero": bench_zero.rows,
    }
    if against is not None and against not in groups:
        raise UsageError(f"there is no {against} to measure against; use one of {', '.join(groups)}")
    keep_freed_memory()  # as `vlm train` does
    chosen = [against] if against is not None else ["open_clip", "idefics", "padded"]
    return [row for name in chosen for row in groups[name]()]


class Training:
    """Steps of a stage as `vlm train` takes them, on the first of its batches, again and again.

    model, stage: as a config says them. samples: key -> caption of made-up pictures. other: more of the config.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        stage: Mapping[str, Any],
        captions: list[str],
        folder: Path,
        **other: Any,
    ) -> None:
        join()
        self.config = config_of(model, stage, captions, folder, **other)
        built, self.processor = build(self.config)
        out, shards = Path(self.config.out), RunData.open(self.config)
        log = RunLog(out, main=False)
        run = Run(self.config, shards, self.processor, log, Checkpoints(out, keep=1), StopSignal())
        self.engine, _ = start_engine(run, built, 0)
        data = shards.micro_batches(built, self.processor, 0)
        self.batches: list[Batch] = []
        for number in range(self.engine.gradient_accumulation_steps()):
            batch = data[number]
            if isinstance(batch, Exception):
                raise batch
            self.batches.append(batch)

    def step(self) -> None:
        """One step of the optimizer."""
        for batch, plan in zip(self.batches, prepare(self.engine, self.batches), strict=True):
            loss, _ = self.engine(on_device(batch, self.engine.device), plan)
            self.engine.backward(loss)
            take_step(self.engine)


def config_of(
    model: Mapping[str, Any], stage: Mapping[str, Any], captions: list[str], folder: Path, **other: Any
) -> Config:
    """A config of one stage on pictures with these captions, written as shards under `folder`."""
    rng = np.random.default_rng(0)
    with ShardWriter(folder / "shards") as writer:
        for number, caption in enumerate(captions):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "PNG")
            writer.write(f"{number:05d}", {"png": file.getvalue(), "txt": caption.encode()})
    whole = {
        "model": dict(model),
        "data": {"train": str(folder / "shards"), "workers": 0},
        "stages": [{"steps": 1, "lr": 1e-4, "batch": len(captions), **stage}],
        "out": str(folder / "out"),
    }
    return Config.model_validate(whole | other)


def captions(count: int, fewest: int, most: int) -> list[str]:
    """Made-up captions of so many everyday words, which are a token each to any tokenizer."""
    rng = np.random.default_rng(1)
    return [" ".join(rng.choice(WORDS, int(rng.integers(fewest, most + 1)))) for _ in range(count)]


def _in_turns(ours: Callable[[], object], peer: Callable[[], object], samples: int, rounds: int) -> tuple[float, float]:
    """Samples a second of both, after one step each that is not counted."""
    ours(), peer()
    return interleaved(lambda: samples / seconds(ours), lambda: samples / seconds(peer), rounds)


# Beside peers


def bench_open_clip(rounds: int, model: Mapping[str, Any] = CONTRASTIVE, batch: int = 32) -> list[Row]:
    """Contrastive steps beside open_clip's model, tokenizer, padding and loss, of the same sizes."""
    with tempfile.TemporaryDirectory(prefix="vlm-bench-") as folder:
        texts = captions(batch, 18, 22)
        ours = Training(model, {"objective": "contrastive"}, texts, Path(folder))
        pixels = on_device(ours.batches[0], ours.engine.device)["pixel_values"]
        peer = OpenClipPeer(ours.engine.module.model, pixels, texts)
        found = _in_turns(ours.step, peer.step, batch, rounds)
    length = ours.batches[0]["input_ids"].shape[1]
    conditions = (
        f"{_held(ours)}, batch {batch}, texts padded to {length}; peer: open_clip, texts padded to {peer.length}"
    )
    return [Row("contrastive training", *found, "samples/s", conditions, "ratio ≥ 2.5")]


def bench_idefics(rounds: int, model: Mapping[str, Any] = JOINT, batch: int = 8, words: int = 56) -> list[Row]:
    """Joint steps beside transformers' Idefics, Flamingo's open successor, of the same sizes on the same tokens.

    56 words and the prompt before them are rows of 64 tokens.
    """
    with tempfile.TemporaryDirectory(prefix="vlm-bench-") as folder:
        ours = Training(model, {"objective": "joint", "pack": False}, captions(batch, words, words), Path(folder))
        peer = IdeficsPeer(ours.engine.module.model, on_device(ours.batches[0], ours.engine.device))
        found = _in_turns(ours.step, peer.step, batch, rounds)
    length = ours.batches[0]["input_ids"].shape[1]
    conditions = f"{_held(ours)}, batch {batch} × {length} tokens; peer: IdeficsForVisionText2Text"
    return [Row("joint training", *found, "samples/s", conditions, "ratio ≥ 2.0")]


def _held(ours: Training) -> str:
    attention = ours.engine.module.model.language_model.config._attn_implementation
    return f"{torch.get_num_threads()} threads, {ours.config.precision} autocast, attention {attention}, AdamW"


# Memory


def bench_gradcache(
    model: Mapping[str, Any] = SMALL_PICTURES,
    batch: int = 1024,
    uncut: int = 64,
    pieces: Sequence[int] = (64, 32),
    precision: str = "fp32",
) -> list[Row]:
    """The peak memory of `vlm train` for a step of a batch that is cut into micro-batches of each of these sizes, beside
    that of a small batch that is not cut.

    Gradients of all weights stand beside the activations of every micro-batch but the first, so the small batch's memory
    holds the large one in pieces that are smaller than the small batch.
    """
    with tempfile.TemporaryDirectory(prefix="vlm-bench-") as folder:
        texts = captions(uncut, 18, 22)

        def peak(size: int, piece: int) -> float:
            stage = {"objective": "contrastive", "batch": size, "micro_batch": piece}
            return _peak_mb(config_of(model, stage, texts, Path(folder, f"{size}-{piece}"), precision=precision))

        peer = peak(uncut, uncut)
        peaks = [peak(batch, piece) for piece in pieces]
    told = f"contrastive batch {batch} in micro-batches of {{}}, {precision}; peer: batch {uncut}"
    target = "ratio ≥ 0.91, with one of them"
    return [
        Row("gradcache: memory", ours, peer, "MB", told.format(piece), target, less_is_better=True)
        for piece, ours in zip(pieces, peaks, strict=True)
    ]


def _peak_mb(config: Config) -> float:
    """The most memory that `vlm train` held, in a process of its own."""
    file = Path(config.out).with_suffix(".yaml")
    with atomic_write(file, "w") as written:
        written.write(annotated_yaml(config))
    return peak_mb("vlm.train", "--config", str(file))
