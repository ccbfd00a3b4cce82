"""Models whose replies a test decides or can foretell, and pictures that they can tell apart."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from seeing import SeeingModel

from vlm.eval.run import evaluate


def paint(path: Path, number: int) -> Path:
    """A grey picture of this number, 1 to 250 and not 128, which blank pictures have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (number,) * 3).save(path, "PNG" if path.suffix == ".png" else "JPEG", quality=100)
    return path


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")
    return path


class Puppet:
    """Has the surface of what `vlm.load` returns. It sees the numbers of its pictures, and says what it is told to say.

    reply: (numbers of the pictures, prompt) -> text. weigh: (numbers, prompt, what is said) -> (log p, tokens).
    """

    def __init__(
        self,
        reply: Callable[[tuple[int, ...], str], str] = lambda numbers, prompt: "nothing",
        weigh: Callable[[tuple[int, ...], str, str], tuple[float, int]] = lambda numbers, prompt, said: (-1.0, 1),
    ) -> None:
        self.reply, self.weigh = reply, weigh
        self.processor = SimpleNamespace(caption_prompt="Describe.", image_processor=SimpleNamespace(mean=[0.502] * 3))
        weights = torch.nn.ParameterList([torch.zeros(3)])
        self.model = SimpleNamespace(
            name_or_path="puppet",
            gates=dict,
            parameters=weights.parameters,
            named_modules=weights.named_modules,
            modules=list,
        )
        self.conversations: list[Any] = []
        self.vectors: dict[Any, np.ndarray] = {}

    def generate_each(
        self, conversations: Iterable[Any], *, batch_size: int, max_new_tokens: int, temperature: float
    ) -> Iterator[tuple[int, str]]:
        for place, turns in enumerate(conversations):
            self.conversations.append(turns)
            yield place, self.reply(*self._asked(turns[-1]))

    def loglikelihood(self, conversations: Sequence[Any], *, batch_size: int) -> list[tuple[float, int]]:
        self.conversations += conversations
        return [self.weigh(*self._asked(turns[-2]), turns[-1]["content"][0]["text"]) for turns in conversations]

    def loglikelihood_rolling(self, texts: Sequence[str], *, window: int, batch_size: int) -> list[tuple[float, int]]:
        return [(-math.log(2) * len(text.encode()), len(text)) for text in texts]

    def embed_image(self, images: Sequence[Any], *, batch_size: int) -> torch.Tensor:
        return torch.tensor(np.stack([self.vectors[image.getpixel((0, 0))[0]] for image in images]))

    def embed_text(self, texts: Sequence[str], *, batch_size: int) -> torch.Tensor:
        return torch.tensor(np.stack([self.vectors[text] for text in texts]))

    def _asked(self, turn: Any) -> tuple[tuple[int, ...], str]:
        *pictures, text = turn["content"]
        return tuple(part["image"].getpixel((0, 0))[0] for part in pictures), text["text"]


@pytest.fixture
def run_task(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Evaluates one task on a folder without blind and shuffled, into `tmp_path/out`; gives its metrics."""

    def run(puppet: Puppet, task: str, data: Path, **options: Any) -> dict[str, Any]:
        options = {"blind": False, "shuffled": False, "batch": 3, "out": tmp_path / "out"} | options
        return evaluate(puppet, [task], data, **options)["tasks"][task]

    return run


@pytest.fixture(scope="session")
def puppet() -> type[Puppet]:
    """`Puppet`."""
    return Puppet


@pytest.fixture(scope="session")
def picture() -> Callable[[Path, int], Path]:
    """`paint`."""
    return paint


@pytest.fixture(scope="session")
def as_json() -> Callable[[Path, Any], Path]:
    """`write_json`."""
    return write_json


@pytest.fixture
def model() -> SeeingModel:
    return SeeingModel()
