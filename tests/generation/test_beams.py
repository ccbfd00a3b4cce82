"""Beams in the engine against Hugging Face's `generate`, one request at a time: the k best replies, in order, and their scores."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest
import torch
from engines import finish
from models import lively
from transformers import LlamaConfig, LlamaForCausalLM

from vlm.errors import UsageError
from vlm.generation.beams import BeamSearch
from vlm.generation.choosing import continuations
from vlm.generation.decoding import Decoding
from vlm.generation.engine import Engine
from vlm.generation.request import Generation, Prompt

IMAGE, ENDS = 3, [1, *range(7, 288, 9)]  # every ninth word ends a reply, so that beams end at different times
PICTURES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def prompts_of(seed: int, count: int) -> list[Prompt]:
    """Random words, short and long, with 0 to 2 pictures at random places."""
    rng, prompts = random.Random(seed), []
    for _ in range(count):
        ids = [rng.randrange(8, 250) for _ in range(rng.choice([3, 9, 30, 70]))]
        shown = [rng.randrange(len(PICTURES)) for _ in range(rng.choice([0, 1, 1, 2]))]
        for place in rng.sample(range(len(ids)), len(shown)):
            ids[place] = IMAGE
        prompts.append(Prompt(ids, PICTURES[shown] if shown else None))
    return prompts


def judged(model, prompt: Prompt, decoding: Decoding, **options) -> tuple[list[list[int]], torch.Tensor | None]:
    """The new tokens of the k best replies by `generate`, without the end, and their scores."""
    ids = torch.tensor([prompt.ids])
    told = {
        "do_sample": False,
        "eos_token_id": ENDS,
        "pad_token_id": 0,
        "suppress_tokens": [IMAGE],
        "num_return_sequences": decoding.num_beams,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    names = ("max_new_tokens", "num_beams", "length_penalty", "early_stopping", "repetition_penalty")
    told |= {name: getattr(decoding, name) for name in names} | options
    if prompt.pixels is not None:
        told["pixel_values"] = prompt.pixels
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **told)
    rows, ends = out.sequences[:, len(prompt.ids) :].tolist(), told["eos_token_id"]
    whole = [row[: next((n for n, token in enumerate(row) if token in ends), None)] for row in rows]
    return whole, getattr(out, "sequences_scores", None)


def assert_found(search: BeamSearch | None, expected: tuple[list[list[int]], torch.Tensor | None]) -> None:
    """The same replies in the same order, and the same scores."""
    assert search is not None
    assert [one.tokens for one in search.hypotheses] == expected[0]
    scores = torch.tensor([one.score for one in search.hypotheses])
    torch.testing.assert_close(scores, expected[1], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def make_engine(make_tokenizer):
    """An engine over a model."""

    def make(model, rows: int = 8, **options) -> Engine:
        return Engine(model, make_tokenizer(), ENDS, rows=rows, **options)

    return make


@pytest.fixture(scope="module")
def model(make_model):
    """A causal model whose adapters matter."""
    return lively(make_model(gate_init=1.0))


WAYS = [  # length_penalty, early_stopping
    (penalty, early) for penalty in (1.0, 0.0, 2.0, -1.0) for early in (False, True, "never")
]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mixtral", "gemma3_text", "qwen3"])
def test_requests_that_come_and_go_get_the_beams_of_generate(kind, make_model, make_engine):
    """Beside others that do not search; prompts read in pieces, more beams than rows, some cancelled."""
    model, rng = lively(make_model(kind, gate_init=1.0)), random.Random(0)
    engine = make_engine(model, chunk=48)
    waiting = []
    for prompt, beams in zip(prompts_of(len(kind), 9), [1, 2, 3, 5, 1, 2, 8, 4, 3], strict=True):
        penalty, early = rng.choice(WAYS) if beams > 1 else (1.0, False)
        most = rng.choice([2, 8, 12])
        waiting.append((prompt, Decoding(most, num_beams=beams, length_penalty=penalty, early_stopping=early)))
    served: list[Generation] = []
    while waiting or engine.busy:
        for _ in range(rng.choice([0, 1, 3])):
            if waiting:
                served.append(engine.add(*waiting.pop()))
        engine.step()
        if served and rng.random() < 0.05:
            engine.cancel(rng.choice(served))
    ended = [generation for generation in served if generation.finish_reason != "cancelled"]
    assert len(served) == 9 and len(ended) >= 6 and not engine.running
    for generation in ended:
        if generation.search is None:
            assert generation.tokens == judged(model, generation.prompt, generation.decoding)[0][0]
        else:
            assert_found(generation.search, judged(model, generation.prompt, generation.decoding))
            assert generation.tokens == generation.search.hypotheses[0].tokens


@pytest.mark.parametrize(("penalty", "early"), WAYS)
def test_every_way_of_ending_is_that_of_generate(penalty, early):
    """The search alone, over a language of few words, where beams end early, late and several at once."""
    ends, few = [1, 5, 8, 11], {"vocab_size": 14, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = lively(LlamaForCausalLM(LlamaConfig(**few, num_attention_heads=2, pad_token_id=0)).eval())
    reasons, lengths = set(), set()
    for seed, beams in enumerate([2, 3, 4, 5, 6] * 2):
        prompt = Prompt([4, *random.Random(seed).choices(range(14), k=3)])
        decoding = Decoding(7, num_beams=beams, length_penalty=penalty, early_stopping=early, repetition_penalty=1.2)
        search = BeamSearch(decoding, 7, text=None)
        while not search.over:
            said = [prompt.ids + beam.tokens for beam in search.beams]
            with torch.no_grad():
                logits = model(torch.tensor(said)).logits[:, -1]
            totals, count = [beam.log_probability for beam in search.beams], search.wanted(ends)
            search.advance(continuations(logits, totals, said, penalty=1.2, never=IMAGE, count=count), ends)
        assert_found(search, judged(model, prompt, decoding, eos_token_id=ends))
        reasons |= {one.finish_reason for one in search.hypotheses}
        lengths |= {len(one.tokens) for one in search.hypotheses}
    assert "stop" in reasons and len(lengths) > 1


def test_a_stop_string_ends_a_beam_as_in_generate(model, make_engine, make_tokenizer):
    """Two letters that a free search says, as whole text: `generate` knows no half characters."""
    engine = make_engine(model)

    def found(stop: tuple[str, ...]) -> list[Generation]:
        generations = [engine.add(prompt, Decoding(12, num_beams=3, stop=stop)) for prompt in prompts_of(5, 4)]
        finish(engine)
        return generations

    texts = [text for generation in found(()) for _, text in generation.best(3)]
    stop = tuple({pair for text in texts for pair in re.findall(r"(?<=.)[!-~]{2}", text)[:1]})
    stopped = found(stop)
    for generation in stopped:
        options = {"stop_strings": list(stop), "tokenizer": make_tokenizer()}
        assert_found(generation.search, judged(model, generation.prompt, generation.decoding, **options))
        assert generation.text == generation.best(1)[0][1]
    shorter = [text for generation in stopped for _, text in generation.best(3)]
    assert any(string in text for string in stop for text in texts)
    assert not any(string in text for string in stop for text in shorter)


@pytest.mark.parametrize("early", [False, "never"])
def test_as_many_beams_as_replies_find_the_best_of_all_replies(early):
    """A language of four words, one of which ends a reply of up to four: every reply there is, by its worth."""
    most, words, end, generator = 4, 4, 0, torch.Generator().manual_seed(2)
    tables: dict[tuple[int, ...], list[float]] = {}

    def told(said: tuple[int, ...]) -> list[float]:
        if said not in tables:
            tables[said] = torch.randn(words, generator=generator, dtype=torch.float64).log_softmax(-1).tolist()
        return tables[said]

    def replies(said: tuple[int, ...], total: float):
        for word, log_probability in enumerate(told(said)):
            worth = total + log_probability
            if word == end or len(said) + 1 == most:
                yield worth / (len(said) + 1) ** 0.7, [*said, word][: len(said) + (word != end)]
            else:
                yield from replies((*said, word), worth)

    search = BeamSearch(
        Decoding(most, num_beams=words**most, length_penalty=0.7, early_stopping=early), most, text=None
    )
    while not search.over:
        ways = [
            (beam.log_probability + log_probability, number, word)
            for number, beam in enumerate(search.beams)
            for word, log_probability in enumerate(told(tuple(beam.tokens)))
        ]
        parents = search.advance(sorted(ways, reverse=True)[: search.wanted([end])], [end])
        assert len(parents) == len(search.beams)
    every = sorted(replies((), 0.0), reverse=True)
    assert [one.tokens for one in search.hypotheses] == [tokens for _, tokens in every]
    assert [one.score for one in search.hypotheses] == pytest.approx([score for score, _ in every])


def test_a_search_is_the_same_alone_and_in_company(model, make_engine):
    decoding = Decoding(8, num_beams=3)
    engine = make_engine(model, rows=12)
    together = [engine.add(prompt, decoding) for prompt in prompts_of(6, 5)]
    finish(engine)
    for generation in together:
        alone = make_engine(model, rows=3)
        again = alone.add(generation.prompt, decoding)
        finish(alone)
        assert again.search.hypotheses == [
            replace(one, score=pytest.approx(one.score), log_probability=pytest.approx(one.log_probability))
            for one in generation.search.hypotheses
        ]


# What is shared


def test_a_prompt_is_read_once_and_its_picture_encoded_once(model, make_engine):
    encoded, read = [], []
    hooks = [
        model.vision.register_forward_hook(lambda module, args, output: encoded.append(len(args[0]))),
        model.register_forward_pre_hook(
            lambda module, args, told: read.append(tuple(told["input_ids"].shape)), with_kwargs=True
        ),
    ]
    engine = make_engine(model)
    generation = engine.add(Prompt([*range(8, 50), IMAGE, 9], PICTURES[:1]), Decoding(5, num_beams=4))
    finish(engine)
    for hook in hooks:
        hook.remove()
    assert encoded == [1] and read == [(1, 44)] + [(4, 1)] * (len(read) - 1)
    assert_found(generation.search, judged(model, generation.prompt, generation.decoding))


def test_only_what_beams_do_not_have_in_common_is_copied(model, make_engine, monkeypatch):
    engine = make_engine(model)
    copied = []
    monkeypatch.setattr(engine.slots, "copy", lambda *told, copy=engine.slots.copy: (copied.append(told), copy(*told)))
    generation = engine.add(Prompt([*range(8, 50)]), Decoding(20, num_beams=4, early_stopping="never"))
    finish(engine)
    (sources, targets, start, end), *later = copied
    assert (len(set(sources)), len(set(targets)), start, end) == (1, 3, 0, 42)
    assert later and all(42 <= start < end for _, _, start, end in later)
    assert all(not set(sources) & set(targets) for sources, targets, _, _ in copied)
    assert_found(generation.search, judged(model, generation.prompt, generation.decoding))


def test_beams_in_eight_bits_are_copied_with_their_scales(model, make_engine):
    """A row that is copied says what one that was read says: the beams of a text that had to be read again agree."""
    engine, (prompt,) = make_engine(model, int8_cache=True), prompts_of(7, 1)
    generation = engine.add(prompt, Decoding(6, num_beams=4))
    finish(engine)
    for one in generation.search.hypotheses:
        fresh = make_engine(model, int8_cache=True)
        again = fresh.add(Prompt(prompt.ids + one.tokens[:-1], prompt.pixels), Decoding(1, num_beams=4))
        finish(fresh)
        assert one.tokens[-1:] in [other.tokens for other in again.search.hypotheses]


def test_a_row_that_held_the_same_words_with_another_picture_is_read_from_its_parent(model, make_engine):
    engine = make_engine(model, rows=4)
    for shown in ([0], [1]):
        generation = engine.add(Prompt([8, IMAGE, *range(20, 60)], PICTURES[shown]), Decoding(6, num_beams=4))
        finish(engine)
        assert_found(generation.search, judged(model, generation.prompt, generation.decoding))


# Who gets rows


def test_a_search_waits_for_a_row_for_each_beam_and_is_not_overtaken(model, make_engine):
    engine, prompts = make_engine(model, rows=4), prompts_of(8, 4)
    first = engine.add(prompts[0], Decoding(4, num_beams=3))
    second = engine.add(prompts[1], Decoding(4, num_beams=2))
    third = engine.add(prompts[2], Decoding(4))
    engine.step()
    assert (engine.running, engine.waiting) == (1, 2)
    while first.finish_reason is None:
        assert second.search.beams[0].tokens == third.tokens == []
        engine.step()
    finish(engine)
    for generation in (first, second):
        assert_found(generation.search, judged(model, generation.prompt, generation.decoding))


def test_a_search_that_is_cancelled_frees_its_rows(model, make_engine):
    engine, prompts = make_engine(model, rows=4), prompts_of(9, 4)
    reading, searching, waiting, last = (engine.add(prompt, Decoding(9, num_beams=4)) for prompt in prompts)
    engine.cancel(reading)
    while len(searching.search.beams) < 4:
        engine.step()
    assert engine.step() == [] and searching.text == ""
    engine.cancel(searching)
    engine.cancel(waiting)
    assert not engine.running and engine.room.free == 4
    finish(engine)
    assert [one.finish_reason for one in (reading, searching, waiting)] == ["cancelled"] * 3
    assert_found(last.search, judged(model, last.prompt, last.decoding))


def test_the_text_is_there_at_the_end(model, make_engine):
    engine, (prompt,) = make_engine(model), prompts_of(5, 1)
    generation = engine.add(prompt, Decoding(6, num_beams=2))
    while generation.finish_reason is None:
        assert generation.take() == ""
        changed = engine.step()
    assert changed == [generation] and generation.take() == generation.text == generation.best(1)[0][1] != ""


def test_a_search_ends_where_the_room_ends(model, make_engine):
    engine = make_engine(model, length=20)
    generation = engine.add(Prompt([9] * 12), Decoding(64, num_beams=3, early_stopping="never", length_penalty=2.0))
    finish(engine)
    assert_found(generation.search, judged(model, generation.prompt, replace(generation.decoding, max_new_tokens=8)))


def test_more_beams_than_rows_are_refused(model, make_engine):
    with pytest.raises(UsageError, match="num_beams is 9 and this engine has 8 rows; ask for at most so many"):
        make_engine(model).add(Prompt([9]), Decoding(num_beams=9))
