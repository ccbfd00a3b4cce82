"""Texts into another language and back, by any pair of Hugging Face translation models; what no longer says the same is dropped.

Knows sequence-to-sequence models, and when a text that came back may stand for the one that went. Knows nothing of shards
or of how samples are stored.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from vlm.errors import UsageError
from vlm.wording import facts, words

from .augment import Texts, Versions

# What must come back as it went, as often; "not" is counted with any of them.
CHECKED = ("colour", "light", "number", "side", "place", "size", "material", "shape")
LENGTHS = (0.5, 2.0)  # words of a text that came back, as a share of those that went
BEAMS = 4

Translator = Callable[[Sequence[str], int], list[str | None]]


@dataclass(frozen=True)
class BackTranslation:
    """Back-translation (Sennrich et al. 2016) as a way of rewording; both ways by models given by path or hub id.

    there_prefix, back_prefix: what a model of several languages wants in front of every text, `translate English to
    German: ` or `>>deu<< `. temperature: 0 for the best of four beams, else that of the sampling (Edunov et al. 2018), by
    the seed. batch: texts that a model translates at once. device: where; a CUDA device if there is one, by default.
    """

    there: str
    back: str
    there_prefix: str = ""
    back_prefix: str = ""
    seed: int = 0
    temperature: float = 0.0
    batch: int = 32
    device: str | None = None
    name = "back-translation"
    suffix = "bt"

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UsageError(f"temperature is {self.temperature:g}; give 0 or more")
        if self.batch < 1:
            raise UsageError(f"batch is {self.batch} texts; give at least 1")

    def __call__(self, samples: Sequence[Texts], counts: Counter[str]) -> list[Versions]:
        """As `Rewording`, one version a sample. Raises UsageError for a model that cannot be loaded."""
        how = (self.temperature, self.batch, self.device)
        there = seq2seq(self.there, self.there_prefix, *how)
        return back_translate(samples, there, seq2seq(self.back, self.back_prefix, *how), self.seed, counts)


def back_translate(
    samples: Sequence[Texts], there: Translator, back: Translator, seed: int, counts: Counter[str]
) -> list[Versions]:
    """One version of every sample: each of its texts as it came back, or as it was where that will not do.

    Added to `counts`: texts, and why texts were left as they were: see `fault`, `untranslated` for those too long for a
    model or not ended by it.
    """
    texts = [text for sample in samples for text in sample.texts]
    returned = iter(_there_and_back(texts, there, back, zlib.crc32(f"{seed} {texts}".encode())))
    counts["texts"] += len(texts)
    return [[[_checked(text, next(returned), sample.keep, counts) for text in sample.texts]] for sample in samples]


def fault(text: str, returned: str, keep: frozenset[str]) -> str | None:
    """Why a text that came back cannot stand for the one that went; None where it can.

    `facts`: a colour, number, place, direction, size, light, material, shape or negation is gone or new. `answers`: a word
    of `keep`, in lower case, is gone. `question`: it asks no more. `length`: it has less than half or more than twice the
    words. `same`: nothing is new but capitals or spaces.
    """
    went, came = ([match[0].lower() for match in words(one)] for one in (text, returned))
    if went == came:
        return "same"
    if facts(text, *CHECKED) != facts(returned, *CHECKED):
        return "facts"
    if Counter(word for word in went if word in keep) - Counter(came):
        return "answers"
    if text.rstrip().endswith("?") != returned.rstrip().endswith("?"):
        return "question"
    if not LENGTHS[0] * len(went) <= len(came) <= LENGTHS[1] * len(went):
        return "length"
    return None


def _checked(text: str, returned: str | None, keep: frozenset[str], counts: Counter[str]) -> str:
    reason = "untranslated" if returned is None else fault(text, returned, keep)
    if reason is None and returned is not None:
        return returned
    counts[f"kept_for_{reason}"] += 1
    return text


def _there_and_back(texts: Sequence[str], there: Translator, back: Translator, seed: int) -> list[str | None]:
    went = there(texts, seed)
    came = iter(back([text for text in went if text is not None], seed))
    return [None if text is None else next(came) for text in went]


class Seq2Seq:
    """One model and its tokenizer as a translator.

    Raises UsageError where either cannot be loaded.
    """

    def __init__(self, model: str, prefix: str, temperature: float, batch: int, device: str | None) -> None:
        self.prefix, self.temperature, self.batch = prefix, temperature, batch
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model)
            self.model = AutoModelForSeq2SeqLM.from_pretrained(model).eval().to(self.device)
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UsageError(
                f"translation model {model}: can not be loaded ({reason}); give a path or hub id"
            ) from None
        # Some tokenizers say 1e30 where they know no limit, and some models have none.
        limits = (self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", None) or 512)
        self.longest = int(min(limits))

    def __call__(self, texts: Sequence[str], seed: int) -> list[str | None]:
        """Each text's translation; None for one of too many tokens, or one that the model did not end."""
        ids = [self.tokenizer(self.prefix + text)["input_ids"] for text in texts]
        fits = [number for number, row in enumerate(ids) if len(row) <= self.longest]
        translated: list[str | None] = [None] * len(texts)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.inference_mode():
            torch.manual_seed(seed)
            for first in range(0, len(fits), self.batch):
                numbers = fits[first : first + self.batch]
                for number, text in zip(numbers, self._translated([ids[one] for one in numbers]), strict=True):
                    translated[number] = text
        return translated

    def _translated(self, ids: list[list[int]]) -> Iterator[str | None]:
        inputs = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self.device)
        rows = self.model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **self._how(max(map(len, ids)))
        )
        ends = torch.tensor(self.model.generation_config.eos_token_id, device=rows.device)
        # The first token begins the translation, and for some models that is the one that ends it, too.
        for row in rows[:, 1:]:
            ended = torch.isin(row, ends).any()
            yield self.tokenizer.decode(row, skip_special_tokens=True).strip() if ended else None

    def _how(self, longest: int) -> dict[str, Any]:
        how = {"max_new_tokens": min(self.longest, 2 * longest + 16), "max_length": None}
        if self.temperature:
            return how | {"do_sample": True, "temperature": self.temperature, "num_beams": 1}
        return how | {"do_sample": False, "num_beams": BEAMS}


@lru_cache(maxsize=2)
def seq2seq(model: str, prefix: str, temperature: float, batch: int, device: str | None) -> Seq2Seq:
    """The translator of this process; loaded once."""
    return Seq2Seq(model, prefix, temperature, batch, device)
