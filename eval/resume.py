"""What a model has answered so far, kept while a run lasts: one that was killed goes on, and several processes share one.

Knows parts by their number, and that answers are JSON or vectors. Knows nothing of tasks, looks or models beyond the line
that binds a file to them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlm.files import room_for


@dataclass(frozen=True)
class Kept:
    """Where answers are kept, and whose they are."""

    folder: Path
    weights: int

    @classmethod
    def of(cls, folder: Path | None, model: Any) -> Kept | None:
        """The folder for this model's answers; a model that was trained on, in the same place, is another."""
        return cls(folder, _checksum(model.model)) if folder else None


class Answers:
    """The answered parts of one task under one look, in files that begin with what they are bound to.

    Every process appends to a file of its own and reads all. A file bound to something else (another model, prompt,
    batch …) is not read, and is replaced; a last line that a kill cut short is passed over.
    """

    def __init__(self, kept: Kept | None, name: str, bound: Mapping[str, Any], process: int = 0) -> None:
        self._folder = kept.folder if kept else None
        whole = {"model": kept.weights, **bound} if kept else {}
        self._bound = json.dumps(whole, sort_keys=True, ensure_ascii=False)
        self._name = re.sub(r"[^\w@-]", "_", name)
        self._process = process
        self._parts: dict[int, list[Any]] = {}
        for path in self._files():
            self._parts |= dict(self._read(path))

    def __contains__(self, part: int) -> bool:
        return part in self._parts

    def __getitem__(self, part: int) -> list[Any]:
        return self._parts[part]

    def put(self, part: int, answers: Sequence[Any]) -> None:
        """Keep the answers to one part, on the disk if there is a folder. Raises RunError if it is full."""
        self._parts[part] = list(answers)
        if self._folder is None:
            return
        path = self._folder / f"{self._name}.{self._process}.jsonl"
        line = json.dumps([part, [_packed(answer) for answer in answers]], ensure_ascii=False)
        with room_for(path):
            self._folder.mkdir(parents=True, exist_ok=True)
            begun = path.exists() and self._is_ours(path)
            with open(path, "a" if begun else "w", encoding="utf-8") as file:
                # A line break in front, too: what a kill cut short must not swallow this line.
                file.write(f"\n{line}\n" if begun else f"{self._bound}\n{line}\n")

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob(f"{self._name}.*.jsonl")) if self._folder else []

    def _is_ours(self, path: Path) -> bool:
        with open(path, encoding="utf-8") as file:
            return file.readline().rstrip("\n") == self._bound

    def _read(self, path: Path) -> Iterator[tuple[int, list[Any]]]:
        if not self._is_ours(path):
            return
        with open(path, encoding="utf-8", errors="replace") as file:
            next(file)
            for line in file:
                try:
                    part, answers = json.loads(line)
                except ValueError:
                    continue
                yield part, [_unpacked(answer) for answer in answers]


def digest(value: Any) -> str:
    """A short name for what a value's `repr` says."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _checksum(model: torch.nn.Module) -> int:
    """One number for all weights, bit by bit, brought back from whatever layout they are in, one module's at a time."""
    total = 0
    for place, module in model.named_modules():
        for name, value in _held(module).items():
            total = zlib.crc32(f"{place}.{name}".encode(), total)
            total = zlib.crc32(_bits(value), total)
    return total


def _held(module: torch.nn.Module) -> dict[str, Any]:
    """What a module adds to a state dict, by name."""
    held: dict[str, Any] = {}
    if isinstance(packed := getattr(module, "packed", None), torch.Tensor):
        # int4: bringing it back takes a third of a microsecond a weight, and equal weights are packed equally.
        held |= module.named_parameters(recurse=False)
        held |= module.named_buffers(recurse=False)
        return held | {"packed": packed}
    module._save_to_state_dict(held, "", keep_vars=False)
    return held


def _bits(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return repr(value).encode()
    return value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy()


def _packed(answer: Any) -> Any:
    if isinstance(answer, np.ndarray):
        return {"float32": base64.b64encode(answer.astype(np.float32).tobytes()).decode()}
    return answer


def _unpacked(answer: Any) -> Any:
    if isinstance(answer, dict):
        return np.frombuffer(base64.b64decode(answer["float32"]), dtype=np.float32)
    return answer
