"""A model that sees colours and nothing else, and shards of pictures for it."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from vlm.shards import ShardWriter

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
PROMPT = "Describe the picture."


def png(colour: tuple[int, int, int], size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


class SeeingModel:
    """Has the surface of what `vlm.load` returns, needs no training: it reads the answer off the pixels.

    So it knows what it is shown and nothing else: it names the picture's colour, and is "unsure" of one it does not know.
    """

    def __init__(self) -> None:
        self.processor = SimpleNamespace(caption_prompt=PROMPT, image_processor=SimpleNamespace(mean=[0.5, 0.5, 0.5]))
        self.weights = torch.nn.ParameterList([torch.zeros(3)])
        self.model = SimpleNamespace(
            name_or_path="seeing",
            gates=lambda: {"0": (0.5, 0.25)},
            parameters=self.weights.parameters,
            named_modules=self.weights.named_modules,
            modules=list,
        )
        self.asked: Counter[tuple[bytes, str]] = Counter()
        self.questions: list[int] = []  # the batch that each was asked in

    def generate_each(
        self, conversations: Iterable[Any], *, batch_size: int, max_new_tokens: int, temperature: float
    ) -> Iterator[tuple[int, str]]:
        assert temperature == 0 and batch_size >= 1
        for place, (turn,) in enumerate(conversations):
            *pictures, text = turn["content"]
            self.asked[pictures[0]["image"].tobytes(), text["text"]] += 1
            self.questions.append(batch_size)
            seen = self._name(pictures[0]["image"])
            yield place, f"a small {seen} circle" if text["text"] == PROMPT else seen

    def embed_image(self, images: Sequence[Image.Image], *, batch_size: int) -> torch.Tensor:
        return torch.stack([self._vector(self._name(image)) for image in images])

    def embed_text(self, texts: Sequence[str], *, batch_size: int) -> torch.Tensor:
        return torch.stack([self._vector(next((c for c in COLOURS if c in text), "unsure")) for text in texts])

    def loglikelihood(self, conversations: Sequence[Any], *, batch_size: int) -> list[tuple[float, int]]:
        weighed = []
        for messages in conversations:
            parts = [part for message in messages for part in message["content"]]
            told = messages[-1]["content"][0]["text"]
            seen = {self._name(part["image"]) for part in parts if part["type"] == "image"}
            weighed.append((-0.1 if any(one in told for one in seen) else -4.0, 2))
        return weighed

    def _name(self, image: Image.Image) -> str:
        return next((name for name, rgb in COLOURS.items() if image.getpixel((0, 0)) == rgb), "unsure")

    def _vector(self, name: str) -> torch.Tensor:
        return torch.eye(5)[[*COLOURS, "unsure"].index(name)]


def write_pictures(folder: Path, number: int = 8, **more: Any) -> Path:
    """Shards of one-coloured pictures, each with a caption, two questions, its object and a label."""
    with ShardWriter(folder, samples_per_shard=3) as writer:
        for place in range(number):
            name = list(COLOURS)[place % 4]
            fields = {
                "caption": f"a small {name} circle",
                "qa": [
                    {"question": "What colour is it?", "answer": name, "type": "colour"},
                    {"question": f"Is it {name}?", "answer": "yes", "type": "existence"},
                ],
                "objects": [{"size": "small", "colour": name, "shape": "circle", "x": 0.5}],
                "label": name,
            }
            writer.write(f"{place:03d}", {"png": png(COLOURS[name]), "json": json.dumps(fields | more).encode()})
    return folder


ALL = ["vqa", "caption", "retrieval", "classification", "perplexity"]
