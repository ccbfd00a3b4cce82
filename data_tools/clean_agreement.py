"""How well the text of a pair fits its picture, as a trained contrastive model sees it.

Knows batches of pairs and cosines (CLIPScore, Hessel et al. 2021; as a filter of data, DataComp, Gadre et al. 2023).
Knows nothing of what is done with a score.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vlm.samples import Sample, pair_text

if TYPE_CHECKING:
    from torch import Tensor

    from vlm.api import VLM

BATCH = 32  # pairs at once


class Agreement:
    """Scores pairs in the order they are added: the cosine of picture and text, nan where there is nothing to compare.

    Of a text of more tokens than the model takes, its first ones count.
    model: the folder of a trained model; None: nothing is scored.
    """

    def __init__(self, model: str | None) -> None:
        self.model = model
        self._scores: list[float] = []
        self._waiting: list[tuple[int, Image.Image, str]] = []

    def add(self, sample: Sample | None, pictures: Sequence[Image.Image]) -> None:
        """A sample with its pictures, of which the first goes with the text; None: it is out already."""
        text = pair_text(sample) if sample is not None else None
        if self.model is not None and text is not None and pictures:
            self._waiting.append((len(self._scores), pictures[0], text))
        self._scores.append(np.nan)
        if len(self._waiting) == BATCH:
            self._score()

    def scores(self) -> np.ndarray:
        """The scores of all samples that were added (samples,) float32."""
        if self._waiting:
            self._score()
        return np.array(self._scores, np.float32)

    def _score(self) -> None:
        places, pictures, texts = zip(*self._waiting, strict=True)
        model = _loaded(str(self.model))
        cosines = (model.embed_image(list(pictures)) * _embedded(model, texts)).sum(-1)
        for place, cosine in zip(places, cosines, strict=True):
            self._scores[place] = float(cosine)
        self._waiting = []


def _embedded(model: VLM, texts: Sequence[str]) -> Tensor:
    """Texts -> (texts, D) float32 of unit length, as `embed_text` has them, which refuses one of too many tokens."""
    import torch

    encoded = model.processor.encode_text(texts)
    first = {name: tensor[:, : model.model.max_tokens] for name, tensor in encoded.items()}
    with torch.no_grad():
        rows = model.model.encode_text(**first, normalize=False)
    return torch.nn.functional.normalize(rows.float(), dim=-1)


@lru_cache(maxsize=1)
def _loaded(folder: str) -> VLM:
    """The model of this process: pairs are scored by as many processes as there are cores, each with one thread."""
    import torch

    from vlm.api import load

    torch.set_num_threads(1)
    return load(folder, device="cpu")
