"""How text is chosen and handed over: settings, repeatable sampling, streaming. Over Hugging Face's `generate`.

Knows tokens and threads. Knows nothing of pictures, conversations or models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from vlm.errors import UsageError


@dataclass(frozen=True)
class Decoding:
    """How text is chosen, token by token.

    max_new_tokens: at most this many. temperature: 0 takes the likeliest token, above 0 samples.
    top_k, top_p: sample among the k likeliest, or the likeliest that hold p of the probability. num_beams: beam search.
    seed: makes sampling repeatable; the global random state is left as it was.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    num_beams: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("num_beams", self.num_beams >= 1, "at least 1"),
        ):
            if not fits:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be {wanted}")
        for name in ("top_k", "top_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                raise UsageError(
                    f"{name} is {getattr(self, name)} and temperature is 0, which does not sample; raise one"
                )

    def config(self, defaults: GenerationConfig, room: int) -> GenerationConfig:
        """The same for Hugging Face's `generate`, with a model's `defaults` (token ids) and no more than `room` tokens."""
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            sampling = {
                "do_sample": True,
                "temperature": self.temperature,
                "top_k": self.top_k or 0,
                "top_p": self.top_p or 1.0,
            }
        kept = {name: getattr(defaults, name) for name in ("eos_token_id", "pad_token_id", "suppress_tokens")}
        new_tokens = min(self.max_new_tokens, room)
        return GenerationConfig(**kept, **sampling, max_new_tokens=new_tokens, num_beams=self.num_beams)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw from `seed` within the block, and leave the global random state as it was; None draws from that state."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def streamed(tokenizer: PreTrainedTokenizerBase, generate: Callable[..., Any]) -> Iterator[str]:
    """Pieces of text while `generate(streamer=…, stopping_criteria=…)` runs in a thread of its own.

    What it raises is raised here. When the reader stops early, so does it, at the next token.
    """
    pieces: SimpleQueue[str | Exception | None] = SimpleQueue()
    stop = _Stop()

    def work() -> None:
        try:
            generate(streamer=_Pieces(tokenizer, pieces), stopping_criteria=StoppingCriteriaList([stop]))
            pieces.put(None)
        except Exception as error:
            pieces.put(error)

    thread = Thread(target=work, name="vlm-stream", daemon=True)
    thread.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            if piece:
                yield piece
    finally:
        stop.asked.set()
        thread.join()


class _Pieces(TextStreamer):
    """Puts each piece of text, as soon as no later token can change it, into a queue."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pieces: SimpleQueue) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.pieces = pieces

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.put(text)


class _Stop(StoppingCriteria):
    """Ends a generation when `asked` is set."""

    def __init__(self) -> None:
        self.asked = Event()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.asked.is_set(), device=input_ids.device)
