"""Engines that take the same steps in several processes, each with its own part of one model.

Knows what an engine is asked between two steps. Knows nothing of processes, pipes or of how a model is cut up.

An engine's decisions follow from what it was asked and from logits, which are the same everywhere. So it is enough that each
engine hears, before a step, what was added and cancelled since the last one. Each step also says what the leading engine has
chosen so far: one that has chosen anything else must not go on.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from vlm.errors import RunError

from .decoding import Decoding
from .engine import Engine
from .request import Generation, Prompt


@dataclass(frozen=True)
class Added:
    """A request, which everyone counts as the next one. decoding: with a seed."""

    prompt: Prompt
    decoding: Decoding


@dataclass(frozen=True)
class Cancelled:
    """The end of the request with that number."""

    number: int


@dataclass(frozen=True)
class Step:
    """What an engine does next. news: what came since its last step, in order. chosen: of everything so far, a checksum."""

    news: tuple[Added | Cancelled, ...]
    chosen: int


class Chosen:
    """A checksum of all the tokens that an engine has chosen, and of how replies ended."""

    def __init__(self) -> None:
        self.sum = 0

    def add(self, generations: Iterable[Generation]) -> None:
        """What a step has changed."""
        for one in generations:
            self.sum = zlib.crc32(repr((one.tokens[-1:], one.finish_reason)).encode(), self.sum)


class LeadingEngine(Engine):
    """An engine that others follow. turn: tells them of a step, and holds them to it for the time of a block."""

    def __init__(self, *parts: Any, turn: Callable[[Step], AbstractContextManager[None]], **options: Any) -> None:
        super().__init__(*parts, **options)
        self._turn, self._chosen = turn, Chosen()
        self._news: list[Added | Cancelled] = []
        self._numbers: dict[Generation, int] = {}
        self._count = 0

    def add(self, prompt: Prompt, decoding: Decoding) -> Generation:
        """As of any engine. What needs a seed is given one, so that luck is the same everywhere."""
        if decoding.seed is None:
            decoding = replace(decoding, seed=int(torch.randint(2**62, ())))
        generation = super().add(prompt, decoding)
        self._news.append(Added(prompt, decoding))
        self._numbers[generation] = self._count
        self._count += 1
        return generation

    def cancel(self, generation: Generation) -> None:
        """As of any engine."""
        super().cancel(generation)
        if (number := self._numbers.pop(generation, None)) is not None:
            self._news.append(Cancelled(number))

    def step(self) -> list[Generation]:
        """As of any engine, together with those that follow."""
        news, self._news = self._news, []
        with self._turn(Step(tuple(news), self._chosen.sum)):
            changed = super().step()
        self._chosen.add(changed)
        for one in changed:
            if one.finish_reason is not None:
                self._numbers.pop(one)
        return changed


class Follower:
    """Leads an engine through the steps that another one has told."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._chosen = engine, Chosen()
        self._running: dict[int, Generation] = {}
        self._count = 0

    def step(self, told: Step) -> None:
        """Take one. Raises RunError where this engine has chosen otherwise before."""
        if told.chosen != self._chosen.sum:
            raise RunError("a process that follows has chosen other tokens than the first; start them again")
        for one in told.news:
            if isinstance(one, Added):
                self._running[self._count] = self._engine.add(one.prompt, one.decoding)
                self._count += 1
            else:
                self._engine.cancel(self._running.pop(one.number))
        self._chosen.add(self._engine.step())
        self._running = {number: one for number, one in self._running.items() if one.finish_reason is None}
