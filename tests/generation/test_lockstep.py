"""An engine that follows another chooses what that one chooses, from what it is told before each step and nothing else."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from models import lively

from vlm.errors import RunError, UsageError
from vlm.generation.decoding import Decoding
from vlm.generation.engine import Engine
from vlm.generation.lockstep import Follower, LeadingEngine, Step
from vlm.generation.request import Generation, Prompt

IMAGE, ROWS = 3, 3
SETTINGS = [
    Decoding(12),
    Decoding(12, temperature=1.0),
    Decoding(12, temperature=1.0, top_k=20, repetition_penalty=1.2),
    Decoding(12, num_beams=2),
]


@pytest.fixture(scope="module")
def model(make_model):
    """The same for all."""
    return lively(make_model(gate_init=1.0))


@pytest.fixture
def engine_of(model, make_tokenizer) -> Callable[..., Engine]:
    """An engine of that class."""

    def make(kind: type[Engine] = Engine, **options) -> Engine:
        return kind(model, make_tokenizer(), [1], rows=ROWS, **options)

    return make


class Pair:
    """An engine and one that follows it, which shares no object with the first. steps: what was told."""

    def __init__(self, engine_of: Callable[..., Engine]) -> None:
        self.leading = engine_of(LeadingEngine, turn=self._turn)
        self.engine = engine_of()
        self.follower, self.steps = Follower(self.engine), []

    @contextmanager
    def _turn(self, step: Step) -> Iterator[None]:
        self.steps.append(pickle.dumps(step))
        yield

    def follow(self) -> None:
        for step in self.steps:
            self.follower.step(pickle.loads(step))


def prompts(count: int) -> list[Prompt]:
    """With no, one and two pictures."""
    rng, pictures = random.Random(0), torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    told = []
    for number in range(count):
        ids = [rng.randrange(6, 250) for _ in range(rng.choice([4, 30]))]
        shown = number % 3
        ids[:shown] = [IMAGE] * shown
        told.append(Prompt(ids, pictures[rng.sample(range(3), shown)] if shown else None))
    return told


def state(engine: Engine) -> list[tuple[list[int], list[int] | None]]:
    """What lies in each row and what is said there."""
    return [(row.tokens, row.generation and row.generation.tokens) for row in engine.room.rows]


def test_requests_come_and_go_alike(engine_of):
    """Of all kinds, sampled without a seed too, cancelled while they wait and while they speak."""
    pair, added = Pair(engine_of), []
    for number, prompt in enumerate(prompts(9)):
        added.append(pair.leading.add(prompt, SETTINGS[number % 4]))
        if number == 5:
            pair.leading.cancel(added[1])  # speaks
            pair.leading.cancel(added[5])  # waits, and has not been told of
        if number % 2:
            pair.leading.step()
    while pair.leading.busy:
        pair.leading.step()
        if len(pair.steps) == 9:
            pair.leading.cancel(added[8])
    followed: list[Generation] = []
    add = pair.engine.add
    pair.engine.add = lambda *asked: followed.append(add(*asked)) or followed[-1]
    pair.follow()
    assert [(one.tokens, one.finish_reason) for one in followed] == [(one.tokens, one.finish_reason) for one in added]
    assert {one.finish_reason for one in added} >= {"cancelled", "length"}
    assert len({tuple(one.tokens) for one in added}) > 5
    assert state(pair.engine) == state(pair.leading)
    assert not pair.engine.busy and not pair.follower._running and not pair.leading._numbers


def test_it_is_an_engine_like_any(engine_of):
    """What is told to others changes nothing: the same tokens, sampled with a seed or without, and the same refusals."""
    leading, alone = Pair(engine_of).leading, engine_of()
    said = []
    for engine in (leading, alone):
        torch.manual_seed(5)
        decodings = [*SETTINGS, replace(SETTINGS[1], seed=9)]
        replies = [engine.add(*asked) for asked in zip(prompts(5), decodings, strict=True)]
        while engine.busy:
            engine.step()
        said.append([one.tokens for one in replies])
        with pytest.raises(UsageError, match="the prompt has 0 tokens"):
            engine.add(Prompt([]), Decoding())
    assert said[0] == said[1]


def test_one_that_has_chosen_otherwise_does_not_go_on(engine_of):
    pair = Pair(engine_of)
    pair.leading.add(prompts(1)[0], SETTINGS[0])
    pair.leading.step()
    pair.leading.step()
    first, second = map(pickle.loads, pair.steps)
    pair.follower.step(first)
    pair.follower.step(second)
    with pytest.raises(RunError, match="has chosen other tokens than the first; start them again"):
        pair.follower.step(second)
