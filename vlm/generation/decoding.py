"""How text is chosen: the settings of a reply.

Knows numbers and what they may be. Knows nothing of models, tokens or pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

from vlm.errors import UsageError

COOLEST, NARROWEST = 1e-6, 1e-6  # temperature and top_p below which float32 may have no likeliest token any more
WARMEST = 1e6  # all tokens are alike long before
SEEDS = 2**63 - 1  # a seed counts modulo this


@dataclass(frozen=True)
class Decoding:
    """How text is chosen, token by token.

    max_new_tokens: at most this many. temperature: 0 takes the likeliest token, above 0 samples. It and top_p become 1e-6
    where they are above 0 and below that.
    top_k, top_p, min_p: sample among the k likeliest, the likeliest that hold p of the probability, or those with at least
    min_p of the likeliest one's. repetition_penalty: divides the logits of words that were said (CTRL, Keskar et al. 2019).
    num_beams: beam search, which does not sample. length_penalty: a reply is worth the sum of its log-probabilities divided
    by its length to this power. early_stopping: whether the search ends as soon as `num_beams` replies are whole; False, when
    no better one is likely; "never", when none is possible. stop: strings that end the reply and are no part of it.
    seed: any whole number, makes sampling repeatable; the global random state is left as it was. None draws from that state.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= WARMEST, f"at least 0 and at most {WARMEST:g}"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "at least 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
            ("num_beams", self.num_beams >= 1, "at least 1"),
            ("length_penalty", -10 <= self.length_penalty <= 10, "at least -10 and at most 10"),
            ("early_stopping", self.early_stopping in ("never", True, False), "True, False or 'never'"),
            ("stop", _are_strings(self.stop), "a string or a list of strings"),
            ("seed", self.seed is None or isinstance(self.seed, Integral), "a whole number"),
        ):
            if not fits:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be {wanted}")
        if self.num_beams > 1 and self.temperature > 0:
            raise UsageError(
                f"num_beams is {self.num_beams} and temperature is {self.temperature}; beams do not sample, give one of them"
            )
        for name in ("top_k", "top_p", "min_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                raise UsageError(
                    f"{name} is {getattr(self, name)} and temperature is 0, which does not sample; raise one"
                )
        for name, none in (("length_penalty", 1.0), ("early_stopping", False)):
            if self.num_beams == 1 and getattr(self, name) != none:
                raise UsageError(
                    f"{name} is {getattr(self, name)} and num_beams is 1, which searches nothing; raise num_beams"
                )
        self._settle()

    def _settle(self) -> None:
        """Write one thing in one way."""
        settled: dict[str, Any] = {"stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)}
        if self.temperature > 0:
            settled["temperature"] = max(self.temperature, COOLEST)
        if self.top_p is not None:
            settled["top_p"] = max(self.top_p, NARROWEST)
        if self.seed is not None:
            settled["seed"] = int(self.seed) % SEEDS
        for name, value in settled.items():
            object.__setattr__(self, name, value)


def _are_strings(stop: Any) -> bool:
    return isinstance(stop, (str, list, tuple)) and all(isinstance(one, str) for one in stop)
