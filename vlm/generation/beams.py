"""Beam search: which continuations of a request's beams go on, which are whole replies, and when nothing better can come.

Knows scores, beams and hypotheses. Knows nothing of logits, or of where a beam's keys and values lie.

The rules are those of Hugging Face's `generate`. Of the likeliest continuations of all beams together, the first k that do
not end go on as the next k beams. One that ends is a hypothesis if it is among the first k, and worth the sum of its
tokens' log-probabilities, the end's too, divided by their number ** `length_penalty`; the k best hypotheses are kept.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .decoding import Decoding
from .text import ReplyText

Continuation = tuple[float, int, int]  # log-probability of beam and word together, number of the beam, word


@dataclass(frozen=True)
class Beam:
    """A reply that goes on. text: what of it can be shown, where a stop string may end it."""

    tokens: list[int]
    log_probability: float
    text: ReplyText | None


@dataclass(frozen=True)
class Hypothesis:
    """A whole reply. tokens: without the one that ends it. finish_reason: "stop" or "length"."""

    tokens: list[int]
    log_probability: float
    score: float
    finish_reason: str


class BeamSearch:
    """The search for one reply of at most `most` tokens.

    beams: those that go on, the likeliest first; one of no tokens at the beginning. hypotheses: the best first.
    over: nothing goes on, or nothing that goes on is thought to become better than what is there: with `early_stopping` as
    soon as k hypotheses are there; else when the best beam, at the length it has, is worth no more than the worst of k
    hypotheses; with "never" at the length at which it could be worth most.
    """

    def __init__(self, decoding: Decoding, most: int, text: ReplyText | None) -> None:
        self.decoding, self.most = decoding, most
        self.beams = [Beam([], 0.0, text)]
        self.hypotheses: list[Hypothesis] = []
        self.over = False

    def wanted(self, ends: Collection[int]) -> int:
        """How many continuations to look at, so that k of them go on: `ends`, tokens that end a reply, may end k each."""
        return self.decoding.num_beams * max(2, 1 + len(ends))

    def advance(self, likeliest: Sequence[Continuation], ends: Collection[int]) -> list[int]:
        """One token more, the `likeliest` continuations given, best first -> which beam each of the new ones goes on from."""
        width, length = self.decoding.num_beams, len(self.beams[0].tokens) + 1
        parents: list[int] = []
        beams: list[Beam] = []
        for rank, (total, parent, word) in enumerate(likeliest):
            if rank >= width and len(beams) == width:
                break
            beam = self._continued(self.beams[parent], total, word)
            stops = word in ends or (beam.text is not None and beam.text.stopped)
            if stops or length == self.most:
                if rank < width:
                    tokens = self.beams[parent].tokens if word in ends else beam.tokens
                    reason = "stop" if stops else "length"
                    self.hypotheses.append(Hypothesis(tokens, total, self._score(total, length), reason))
            elif len(beams) < width:
                beams.append(beam)
                parents.append(parent)
        self.hypotheses = sorted(self.hypotheses, key=lambda one: -one.score)[:width]
        self.beams, self.over = beams, not beams or self._is_settled(beams[0], length)
        return parents

    def _continued(self, beam: Beam, total: float, word: int) -> Beam:
        return Beam([*beam.tokens, word], total, beam.text and beam.text.after(word))

    def _score(self, log_probability: float, length: int) -> float:
        return log_probability / length**self.decoding.length_penalty

    def _is_settled(self, best: Beam, length: int) -> bool:
        if len(self.hypotheses) < self.decoding.num_beams:
            return False
        if self.decoding.early_stopping is True:
            return True
        far = self.decoding.early_stopping == "never" and self.decoding.length_penalty > 0
        return self._score(best.log_probability, self.most if far else length) <= self.hypotheses[-1].score
