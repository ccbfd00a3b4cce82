"""How text is chosen: the settings of a reply.

Knows numbers and what they may be. Knows nothing of models, tokens or pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import GenerationConfig

from vlm.errors import UsageError


@dataclass(frozen=True)
class Decoding:
    """How text is chosen, token by token.

    max_new_tokens: at most this many. temperature: 0 takes the likeliest token, above 0 samples.
    top_k, top_p, min_p: sample among the k likeliest, the likeliest that hold p of the probability, or those with at least
    min_p of the likeliest one's. repetition_penalty: divides the logits of words that were said (CTRL, Keskar et al. 2019).
    num_beams: beam search, which does not sample. stop: strings that end the reply and are no part of it.
    seed: makes sampling repeatable; the global random state is left as it was. None draws from that state.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    num_beams: int = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "at least 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
            ("num_beams", self.num_beams >= 1, "at least 1"),
        ):
            if not fits:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be {wanted}")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        if self.num_beams > 1 and self.temperature > 0:
            raise UsageError(
                f"num_beams is {self.num_beams} and temperature is {self.temperature}; beams do not sample, give one of them"
            )
        for name in ("top_k", "top_p", "min_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                raise UsageError(
                    f"{name} is {getattr(self, name)} and temperature is 0, which does not sample; raise one"
                )

    def beams(self, defaults: GenerationConfig, room: int, best: int = 1) -> GenerationConfig:
        """Beam search for Hugging Face's `generate`: a model's `defaults` (token ids), at most `room` tokens, `best` replies."""
        kept = {name: getattr(defaults, name) for name in ("eos_token_id", "pad_token_id", "suppress_tokens")}
        return GenerationConfig(
            **kept,
            do_sample=False,
            max_new_tokens=min(self.max_new_tokens, room),
            num_beams=self.num_beams,
            num_return_sequences=best,
            repetition_penalty=self.repetition_penalty,
        )
