"""The most memory that each data tool holds, on a hundred times as many texts as it is measured on first.

Knows the tools as a user calls them. Knows nothing of how they work.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vlm.benchmark import Row, peak_mb

WORDS = [f"{first}{last}" for first in ("ba", "ko", "mi", "tel", "sur") for last in ("n", "ra", "ple", "tic", "d")]


def bench_memory(small: int = 10_000, large: int = 1_000_000) -> list[Row]:
    """The most memory that a process of each tool holds, for `large` texts beside `small` ones."""
    with tempfile.TemporaryDirectory(prefix="vlm-bench-") as folder:
        peaks = {count: _peaks(Path(folder, str(count)), count) for count in (small, large)}
    conditions = f"{large:,} texts; peer: {small:,}; the largest process"
    return [
        Row(f"memory: {tool}", peaks[large][tool], peak, "MB", conditions, "≈ 1", less_is_better=True)
        for tool, peak in peaks[small].items()
    ]


def _peaks(folder: Path, count: int) -> dict[str, float]:
    """Peak memory in MB of each tool on `count` texts, by its name."""
    folder.mkdir()
    texts, shards = str(folder / "texts.jsonl"), str(folder / "shards")
    _write_texts(texts, count)
    _save_tokenizer(folder / "tokenizer")
    return {
        "convert": _peak_mb("convert", texts, shards),
        "inspect": _peak_mb("inspect", shards),
        "clean": _peak_mb("clean", shards, str(folder / "clean")),
        "augment": _peak_mb("augment", shards, str(folder / "augmented"), "--with", "synonyms"),
        "text": _peak_mb("text", texts, str(folder / "blocks"), "--tokenizer", str(folder / "tokenizer")),
    }


def _write_texts(path: str, count: int) -> None:
    rng = np.random.default_rng(0)
    with open(path, "w") as file:
        for number in range(count):
            said = " ".join(WORDS[word] for word in rng.integers(0, len(WORDS), 12))
            file.write(json.dumps({"text": f"{said} {number}"}) + "\n")


def _save_tokenizer(folder: Path) -> None:
    """One of bytes alone: what `vlm data text` holds does not depend on how many bytes a token has."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: number for number, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def _peak_mb(*arguments: str) -> float:
    """The most memory that a process of `vlm data …` held."""
    return peak_mb("vlm.cli", "data", *arguments)
