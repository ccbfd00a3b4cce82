"""The next token: Hugging Face's own processors as the judge, and luck that depends on nobody else."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vlm.generation.choosing import Chooser, choose, likelihoods, penalise
from vlm.generation.decoding import Decoding

WORDS = 50
SETTINGS = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 2.0, "min_p": 0.2},
    {"temperature": 0.9, "top_k": 12, "top_p": 0.6, "min_p": 0.05},
    {"temperature": 1.5, "top_k": 1000},
]


def logits_of(rows: int, seed: int = 0) -> torch.Tensor:
    """Random logits (rows, WORDS)."""
    return torch.randn(rows, WORDS, generator=torch.Generator().manual_seed(seed)) * 3


def judge(logits: torch.Tensor, decoding: Decoding) -> torch.Tensor:
    """What `generate` would draw from, (1, V) -> (V,)."""
    steps = LogitsProcessorList([TemperatureLogitsWarper(decoding.temperature)])
    if decoding.top_k:
        steps.append(TopKLogitsWarper(decoding.top_k))
    if decoding.top_p:
        steps.append(TopPLogitsWarper(decoding.top_p))
    if decoding.min_p:
        steps.append(MinPLogitsWarper(decoding.min_p))
    return steps(torch.zeros(1, 1, dtype=torch.long), logits).softmax(-1)[0]


@pytest.mark.parametrize("options", SETTINGS)
def test_likelihoods_are_those_of_generate(options):
    decoding = Decoding(**options)
    for seed in range(20):
        logits = logits_of(1, seed)
        words, probabilities = likelihoods(logits, [decoding])
        ours = torch.zeros(WORDS).scatter(0, words[0], probabilities[0])
        torch.testing.assert_close(ours / ours.sum(), judge(logits, decoding))


def test_a_penalty_is_that_of_generate():
    logits, said = logits_of(1), [3, 7, 7, 40]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([said]), logits.clone())[0]
    assert torch.equal(penalise(logits[0], said, 1.7), expected)


def test_greedy_takes_the_likeliest_and_a_penalty_moves_it():
    logits = logits_of(3)
    best = logits.argmax(-1).tolist()
    tokens, told = choose(logits, [Chooser(Decoding())] * 3, [[]] * 3)
    assert tokens == best
    torch.testing.assert_close(torch.tensor(told), logits.log_softmax(-1).amax(-1))
    moved, _ = choose(logits, [Chooser(Decoding(repetition_penalty=100.0))] * 3, [[word] for word in best])
    assert all(now != then for now, then in zip(moved, best, strict=True))


def test_draws_follow_the_likelihoods():
    """10 000 draws of each setting, each word's share within five standard deviations."""
    for options in SETTINGS:
        chooser = Chooser(Decoding(seed=1, **options))
        logits = logits_of(1)
        drawn, _ = choose(logits.expand(10_000, -1), [chooser] * 10_000, [[]] * 10_000)
        share = torch.bincount(torch.tensor(drawn), minlength=WORDS) / 10_000
        expected = judge(logits, chooser.decoding)
        assert (share[expected == 0] == 0).all()
        assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / 10_000).sqrt() + 1e-9).all()


def test_a_rows_luck_does_not_depend_on_its_company():
    logits = logits_of(len(SETTINGS))

    def draws(rows: list[int]) -> dict[int, list[int]]:
        choosers = [Chooser(Decoding(seed=row, **SETTINGS[row])) for row in rows]
        steps = [choose(logits[rows], choosers, [[]] * len(rows))[0] for _ in range(30)]
        return {row: [step[place] for step in steps] for place, row in enumerate(rows)}

    together = draws(list(range(len(SETTINGS))))
    for row in range(len(SETTINGS)):
        assert draws([row]) == {row: together[row]}
    assert len({tuple(tokens) for tokens in together.values()}) == len(SETTINGS)


def test_without_a_seed_luck_follows_from_the_global_state():
    def draws() -> list[int]:
        torch.manual_seed(3)
        chooser = Chooser(Decoding(temperature=1.0))
        return [choose(logits_of(1), [chooser], [[]])[0][0] for _ in range(20)]

    assert draws() == draws()
    state = torch.get_rng_state()
    Chooser(Decoding(temperature=1.0, seed=4))
    assert torch.equal(torch.get_rng_state(), state)
