"""The engine against Hugging Face's `generate`, one request at a time: requests of every kind that come and go at random."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from engines import finish
from models import lively

from vlm.errors import UsageError
from vlm.generation.decoding import Decoding
from vlm.generation.engine import Engine
from vlm.generation.request import Prompt

IMAGE, EOS = 3, 1
PICTURES = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def prompt_of(rng: random.Random, length: int, pictures: int) -> Prompt:
    """Random words with pictures at random places."""
    ids = [rng.randrange(6, 250) for _ in range(length)]
    for place in rng.sample(range(length), pictures):
        ids[place] = IMAGE
    shown = [rng.randrange(len(PICTURES)) for _ in range(pictures)]
    return Prompt(ids, PICTURES[shown] if pictures else None)


def prompts_of(seed: int, count: int) -> list[Prompt]:
    """Short and long ones with 0 to 3 pictures."""
    rng = random.Random(seed)
    return [prompt_of(rng, rng.choice([3, 9, 20, 70]), rng.choice([0, 1, 1, 2, 3])) for _ in range(count)]


def judged(model, prompt: Prompt, new_tokens: int, **options) -> list[int]:
    """The new tokens by `generate`, without the end."""
    seen = {} if prompt.pixels is None else {"pixel_values": prompt.pixels}
    ids = torch.tensor([prompt.ids])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **seen,
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=0,
        suppress_tokens=[IMAGE],
        **options,
    )
    tokens = out[0, len(prompt.ids) :].tolist()
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens


@pytest.fixture(scope="module")
def make_engine(make_tokenizer):
    """An engine over a model."""

    def make(model, rows: int = 4, **options) -> Engine:
        return Engine(model, make_tokenizer(), [EOS], rows=rows, **options)

    return make


@pytest.fixture(scope="module")
def model(make_model):
    """A causal model whose adapters matter."""
    return lively(make_model(gate_init=1.0))


@pytest.fixture
def judge_all(model):
    """What each of some prompts gets, alone."""
    return lambda prompts, new_tokens: [judged(model, prompt, new_tokens) for prompt in prompts]


def test_greedy_tokens_are_those_of_generate(causal_family, make_model, make_engine):
    """Prompts read in pieces, more requests than rows, some cancelled; a penalty lets a tiny model say more than one word."""
    penalty = {"repetition_penalty": 3.0}
    model, rng = lively(make_model(causal_family, gate_init=1.0)), random.Random(0)
    engine = make_engine(model, chunk=48)
    waiting = [(prompt, rng.choice([1, 5, 15])) for prompt in prompts_of(0, 12)]
    served = []
    while waiting or engine.busy:
        for _ in range(rng.choice([0, 1, 3])):
            if waiting:
                prompt, most = waiting.pop()
                served.append((engine.add(prompt, Decoding(max_new_tokens=most, **penalty)), most))
        engine.step()
        if rng.random() < 0.1:
            engine.cancel(rng.choice(served)[0])
    assert {generation.finish_reason for generation, _ in served} >= {"length", "cancelled"}
    said = [generation.tokens for generation, _ in served if len(generation.tokens) == 15]
    assert sum(len(set(tokens)) for tokens in said) > 5 * len(said)
    for generation, most in served:
        expected = judged(model, generation.prompt, most, **penalty)
        if generation.finish_reason == "cancelled":
            assert generation.tokens == expected[: len(generation.tokens)]
        else:
            assert generation.tokens == expected
            assert generation.finish_reason == ("length" if len(expected) == most else "stop")


def test_a_reply_ends_where_the_model_ends_it(make_model, make_engine):
    """Every second word is an end, so that many replies are short."""
    model = lively(make_model(gate_init=1.0))
    ends = list(range(6, 288, 2))
    engine = make_engine(model)
    engine.end_tokens = frozenset(ends)
    for prompt in prompts_of(3, 12):
        generation = engine.add(prompt, Decoding(max_new_tokens=10))
        finish(engine)
        whole = judged(model, prompt, 10)
        cut = next((place for place, token in enumerate(whole) if token in ends), None)
        assert generation.tokens == whole[:cut]
        assert generation.finish_reason == ("length" if cut is None else "stop")


@pytest.mark.parametrize("options", [{"chunk": 16}, {"chunk": 1000}, {"rows": 1}, {"rows": 12}])
def test_how_prompts_are_cut_and_shared_out_changes_nothing(model, make_engine, judge_all, options):
    engine, prompts = make_engine(model, **options), prompts_of(1, 10)
    generations = [engine.add(prompt, Decoding(max_new_tokens=6)) for prompt in prompts]
    finish(engine)
    assert [generation.tokens for generation in generations] == judge_all(prompts, 6)


@pytest.mark.heavy
def test_a_compiled_pass_says_the_same(model, make_engine, judge_all):
    """Rows, spans and pictures that change on the way."""
    engine, prompts = make_engine(model, rows=5, compile=True), prompts_of(1, 12)
    generations = [engine.add(prompt, Decoding(max_new_tokens=20)) for prompt in prompts]
    finish(engine)
    assert [generation.tokens for generation in generations] == judge_all(prompts, 20)


def test_who_comes_is_heard_as_soon_as_read_and_holds_the_others_up_every_other_step(model, make_engine):
    engine, prompts = make_engine(model), prompts_of(2, 7)
    there = engine.add(prompts.pop(), Decoding(max_new_tokens=20, repetition_penalty=3.0))
    assert engine.step() == [there] and len(there.tokens) == 1
    for number, prompt in enumerate(prompts, 2):
        who = engine.add(prompt, Decoding(max_new_tokens=1))
        assert engine.step() == [there] and len(there.tokens) == number
        assert engine.step() == [who] and len(who.tokens) == 1 and len(there.tokens) == number


def test_a_draw_is_the_same_alone_and_in_company(model, make_engine):
    prompts = prompts_of(2, 8)
    decodings = [Decoding(max_new_tokens=8, temperature=1.0, top_k=[None, 20][i % 2], seed=i) for i in range(8)]
    engine = make_engine(model, rows=8)
    together = [engine.add(prompt, decoding) for prompt, decoding in zip(prompts, decodings, strict=True)]
    finish(engine)
    for generation in together:
        alone = make_engine(model, rows=1)
        again = alone.add(generation.prompt, generation.decoding)
        finish(alone)
        assert again.tokens == generation.tokens
    other = engine.add(prompts[0], replace(decodings[0], seed=99))
    finish(engine)
    assert other.tokens != together[0].tokens


def test_a_stop_string_ends_a_reply_and_frees_its_row(model, make_engine):
    engine, prompt = make_engine(model, rows=1), prompts_of(4, 1)[0]
    free = engine.add(prompt, Decoding(max_new_tokens=20))
    finish(engine)
    stop = free.text[3:5]
    generation = engine.add(prompt, Decoding(max_new_tokens=20, stop=(stop,)))
    finish(engine)
    assert generation.text == free.text[: free.text.index(stop)] and generation.finish_reason == "stop"
    assert len(generation.tokens) < len(free.tokens) and not engine.running


def test_what_is_taken_piece_by_piece_is_the_text(model, make_engine):
    engine = make_engine(model)
    generations = [engine.add(prompt, Decoding(max_new_tokens=12)) for prompt in prompts_of(5, 6)]
    pieces: dict = {generation: [] for generation in generations}
    while engine.busy:
        for generation in engine.step():
            pieces[generation].append(generation.take())
    assert all("".join(taken) == generation.text for generation, taken in pieces.items())


# What is kept


def test_the_next_turn_reads_only_what_is_new(model, make_engine, judge_all):
    engine, first = make_engine(model), prompts_of(6, 1)[0]
    said = engine.add(first, Decoding(max_new_tokens=8))
    finish(engine)
    second = Prompt(first.ids + said.tokens + [9, 8, 7], first.pixels)
    reply = engine.add(second, Decoding(max_new_tokens=8))
    finish(engine)
    assert reply.reused == len(first.ids) + 7  # the last token was said and never read
    assert reply.tokens == judge_all([second], 8)[0]


def test_requests_that_begin_alike_share_what_was_read(model, make_engine, judge_all):
    rng = random.Random(7)
    begin = prompt_of(rng, 40, 2)
    prompts = [Prompt(begin.ids + [rng.randrange(6, 250) for _ in range(5)], begin.pixels) for _ in range(5)]
    engine = make_engine(model, rows=5)
    generations = [engine.add(prompt, Decoding(max_new_tokens=6)) for prompt in prompts]
    finish(engine)
    assert [generation.reused for generation in generations] == [0, 40, 40, 40, 40]
    assert [generation.tokens for generation in generations] == judge_all(prompts, 6)


def test_another_picture_in_the_same_text_is_another_beginning(model, make_engine, judge_all):
    engine = make_engine(model, rows=1)
    ids = [7, 8, IMAGE, *range(10, 40), IMAGE, *range(40, 60)]
    prompts = [Prompt(ids, PICTURES[shown]) for shown in ([0, 1], [0, 2], [3, 1], [3, 1])]
    generations = [engine.add(prompt, Decoding(max_new_tokens=4)) for prompt in prompts]
    finish(engine)
    assert [generation.tokens for generation in generations] == judge_all(prompts, 4)
    assert [generation.reused for generation in generations] == [0, ids.index(IMAGE, 5), 2, len(ids) - 1]


def test_what_was_read_with_other_weights_is_forgotten(make_model, make_engine):
    model, prompt = lively(make_model(gate_init=1.0)), prompts_of(8, 1)[0]
    engine = make_engine(model)
    before = engine.add(prompt, Decoding(max_new_tokens=6))
    finish(engine)
    with torch.no_grad():
        model.language_model.lm_head.weight.neg_()
        model.language_model.model.layers[0].mlp.up_proj.weight.mul_(3)
    after = engine.add(prompt, Decoding(max_new_tokens=6))
    finish(engine)
    assert after.reused == 0 and after.tokens == judged(model, prompt, 6) != before.tokens


def test_a_picture_is_encoded_once_wherever_it_hangs(model, make_engine):
    seen: list[int] = []
    hook = model.vision.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    engine = make_engine(model, rows=6)
    for shown in ([0], [1, 0], [0, 0], [2, 1]):
        engine.add(Prompt([9, *[IMAGE] * len(shown), 7], PICTURES[shown]), Decoding(max_new_tokens=2))
    finish(engine)
    engine.add(Prompt([8, IMAGE, IMAGE], PICTURES[[2, 0]]), Decoding(max_new_tokens=2))
    finish(engine)
    hook.remove()
    assert seen == [3]


def test_text_alone_passes_no_adapter(model, make_engine):
    entered: list[int] = []
    hooks = [adapter.register_forward_hook(lambda *_: entered.append(1)) for adapter in model.adapters.values()]
    engine = make_engine(model)
    generation = engine.add(Prompt([9, 8, 7]), Decoding(max_new_tokens=3))
    finish(engine)
    for hook in hooks:
        hook.remove()
    assert not entered and len(generation.tokens) == 3


def test_nothing_grows_and_memory_is_linear_in_rows_and_length(model, make_engine):
    def full(rows: int, length: int) -> int:
        engine, sizes, rng = make_engine(model, rows=rows, length=length), set(), random.Random(0)
        for _ in range(5):
            for _ in range(2 * rows):
                engine.add(prompt_of(rng, rng.randrange(2, 20), 1), Decoding(max_new_tokens=length))
            for _ in range(6):
                engine.step()
            engine.cancel_all()
            sizes.add(engine.cache_bytes)
        assert len(sizes) == 1 and not engine.busy
        return sizes.pop() - engine.gallery.bytes

    small = full(2, 64)
    assert full(4, 64) == 2 * small
    assert full(2, 129) == 2 * small  # a place more than the length is nobody's: 130 = 2 · 65


def test_memory_follows_what_is_written_and_not_what_is_asked_for(make_model, make_engine):
    engine = make_engine(lively(make_model("opt", gate_init=1.0)))  # which takes 2 048 tokens
    reply = engine.add(Prompt([9] * 70), Decoding(max_new_tokens=1900))
    lengths = []
    while len(reply.tokens) < 700:
        engine.step()
        lengths.append(engine.slots.length)
        assert engine.slots.layers[0].tensors()[0].shape[2] == lengths[-1] + 1
    written = [70 + place for place in range(len(lengths))]
    assert lengths[0] == 512 and lengths[-1] == 1024
    assert all(now <= length for now, length in zip(written, lengths, strict=True))


@pytest.mark.parametrize("options", [{}, {"int8_cache": True}])
def test_what_is_reserved_ahead_changes_nothing(model, make_engine, monkeypatch, options):
    """Rows that grow while others come, pictures and searches among them, beside ones with all the room at once."""
    decodings = [Decoding(max_new_tokens=150, repetition_penalty=3.0), Decoding(max_new_tokens=120, num_beams=3)]
    said = []
    for ahead in (1, 10_000):
        monkeypatch.setattr("vlm.generation.room.AHEAD", ahead)
        engine = make_engine(model, rows=6, **options)
        generations = [engine.add(prompt, decodings[place % 2]) for place, prompt in enumerate(prompts_of(11, 8))]
        engine.step()
        begun = engine.slots.length
        finish(engine)
        said.append([generation.tokens for generation in generations])
        assert (begun < engine.slots.length) == (ahead == 1)
    assert said[0] == said[1]


def test_nothing_is_left_on_modules(model, make_engine):
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    engine = make_engine(model)
    engine.add(prompts_of(9, 1)[0], Decoding(max_new_tokens=3))
    finish(engine)
    assert before == {name: set(vars(module)) for name, module in model.named_modules()}


def test_a_cache_in_eight_bits_says_nearly_the_same(model, make_engine, judge_all):
    prompts = prompts_of(10, 8)
    exact, rounded = (make_engine(model, rows=8, int8_cache=kind) for kind in (False, True))
    replies = []
    for engine in (exact, rounded):
        generations = [engine.add(prompt, Decoding(max_new_tokens=6)) for prompt in prompts]
        finish(engine)
        replies.append([generation.tokens for generation in generations])
    same = sum(one[0] == other[0] for one, other in zip(*replies, strict=True))
    assert same >= 6
    heads = 8  # features a head: one float32 scale beside so many int8
    assert rounded.slots.bytes == exact.slots.bytes * (heads + 4) // (4 * heads)


# What is refused


def test_a_request_that_cannot_be_served_is_refused(model, make_model, make_engine):
    engine = make_engine(model, length=20)
    for prompt, decoding, message in (
        (Prompt([]), Decoding(), "the prompt has 0 tokens"),
        (Prompt([9] * 20), Decoding(), "has 20 tokens and 1 to come and this engine takes 20"),
        (Prompt([9, IMAGE]), Decoding(), "1 <image> places and 0 pictures"),
        (Prompt([9], PICTURES[:2]), Decoding(), "0 <image> places and 2 pictures"),
    ):
        with pytest.raises(UsageError, match=message):
            engine.add(prompt, decoding)
    with pytest.raises(UsageError, match="the language model takes 256"):
        make_engine(model).add(Prompt([9] * 256), Decoding())
    with pytest.raises(UsageError, match="length is 300 and the language model takes 256 tokens"):
        make_engine(model, length=300)
    for none in (1, 0, -5):
        with pytest.raises(UsageError, match=f"length is {none} and a prompt and a reply take 2 tokens; raise it"):
            make_engine(model, length=none)
    with pytest.raises(UsageError, match="'bert' reads both ways"):
        make_engine(make_model("bert"))
    assert not engine.busy


def test_a_reply_ends_where_the_room_ends(model, make_engine):
    engine = make_engine(model, length=20)
    generation = engine.add(Prompt([9] * 12), Decoding(max_new_tokens=64))
    finish(engine)
    assert generation.tokens == judged(model, Prompt([9] * 12), 8) and generation.finish_reason == "length"
