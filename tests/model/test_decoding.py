"""How text is chosen: settings that are refused, sampling that repeats and can be narrowed to greedy, streams that end."""

from __future__ import annotations

import dataclasses
import threading
import time

import pytest
import torch
from transformers import GenerationConfig

from vlm.decoding import Decoding, seeded, streamed
from vlm.errors import UsageError

PROMPT = [[70, 71, 72, 73]]
DEFAULTS = GenerationConfig(eos_token_id=[1], pad_token_id=0, suppress_tokens=[3])


@pytest.fixture(scope="module")
def model(make_model):
    """A causal model."""
    return make_model(gate_init=1.0)


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    """Words are bytes."""
    return make_tokenizer()


@pytest.fixture
def new_tokens(model):
    """Decodes a prompt with some settings and gives what is new; `extra` goes to `generate`."""

    def decode(extra: dict | None = None, room: int = 100, **options) -> list[int]:
        decoding = Decoding(**options)
        ids = torch.tensor(PROMPT)
        with seeded(decoding.seed):
            out = model.generate(ids, generation_config=decoding.config(DEFAULTS, room), **extra or {})
        return out[0, ids.shape[1] :].tolist()

    return decode


@pytest.mark.parametrize(
    ("setting", "value", "wanted"),
    [
        ("max_new_tokens", 0, "at least 1"),
        ("temperature", -0.1, "at least 0"),
        ("temperature", float("nan"), "at least 0"),
        ("top_k", 0, "at least 1"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.01, "above 0 and at most 1"),
        ("num_beams", 0, "at least 1"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(setting, value, wanted):
    with pytest.raises(UsageError) as refusal:
        Decoding(**{setting: value})
    assert str(refusal.value) == f"{setting} is {value}; it must be {wanted}"


def test_settings_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Decoding().temperature = 1.0


def test_greedy_takes_the_models_own_tokens():
    config = Decoding().config(DEFAULTS, room=100)
    assert config.do_sample is False and config.eos_token_id == [1] and config.suppress_tokens == [3]


def test_no_more_tokens_than_there_is_room_for(new_tokens):
    assert len(new_tokens(max_new_tokens=64, room=5)) == 5
    assert new_tokens(max_new_tokens=5, room=64) == new_tokens(max_new_tokens=64, room=5)


# Sampling


def test_the_likeliest_of_one_is_greedy(new_tokens):
    greedy = new_tokens(max_new_tokens=12)
    for seed in range(3):
        assert new_tokens(max_new_tokens=12, temperature=1.0, top_k=1, seed=seed) == greedy
        assert new_tokens(max_new_tokens=12, temperature=1.0, top_p=1e-6, seed=seed) == greedy
    assert any(new_tokens(max_new_tokens=12, temperature=1.0, seed=seed) != greedy for seed in range(3))


def test_a_seed_decides_whatever_was_drawn_before(new_tokens):
    options = {"max_new_tokens": 12, "temperature": 2.0}
    first = new_tokens(seed=5, **options)
    torch.rand(7)
    assert new_tokens(seed=5, **options) == first
    assert any(new_tokens(seed=seed, **options) != first for seed in (6, 7))


@pytest.mark.parametrize("failing", [False, True])
def test_a_seed_leaves_the_global_random_state(failing):
    torch.manual_seed(11)
    state = torch.get_rng_state()
    try:
        with seeded(3):
            drawn = torch.rand(4)
            if failing:
                raise ValueError
    except ValueError:
        pass
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4), drawn)


def test_without_a_seed_the_global_state_is_drawn_from():
    torch.manual_seed(11)
    with seeded(None):
        drawn = torch.rand(4)
    torch.manual_seed(11)
    assert torch.equal(torch.rand(4), drawn)


# Streams


@pytest.fixture
def no_thread_stays():
    """Fails the test if a stream's thread outlives it."""
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "vlm-stream"]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 2}])
def test_what_is_streamed_is_what_is_generated(new_tokens, tokenizer, options, no_thread_stays):
    pieces = list(streamed(tokenizer, lambda **extra: new_tokens(extra, max_new_tokens=20, **options)))
    whole = tokenizer.decode(new_tokens(max_new_tokens=20, **options), skip_special_tokens=True)
    assert "".join(pieces) == whole and all(pieces)


def test_pieces_come_while_the_work_goes_on(tokenizer, no_thread_stays):
    """The work waits for the reader to have the first piece, so it cannot have ended before."""
    read = threading.Event()

    def generate(streamer, stopping_criteria):
        streamer.put(torch.tensor(PROMPT))
        for token in tokenizer("one two ", add_special_tokens=False)["input_ids"]:
            streamer.put(torch.tensor([token]))
        assert read.wait(timeout=20)
        streamer.end()

    stream = streamed(tokenizer, generate)
    first = next(stream)
    read.set()
    assert first and first + "".join(stream) == "one two "


def test_a_reader_that_leaves_ends_the_work_at_the_next_token(tokenizer, no_thread_stays):
    finished = []

    def generate(streamer, stopping_criteria):
        streamer.put(torch.tensor(PROMPT))
        for _ in range(10_000):
            if stopping_criteria(torch.tensor(PROMPT), None).all():
                return
            for token in tokenizer("word ", add_special_tokens=False)["input_ids"]:
                streamer.put(torch.tensor([token]))
            time.sleep(0.001)
        finished.append(True)

    stream = streamed(tokenizer, generate)
    assert next(stream)
    stream.close()
    assert not finished


@pytest.mark.parametrize("after", [0, 1])
def test_an_error_in_the_work_reaches_the_reader(tokenizer, after, no_thread_stays):
    def generate(streamer, stopping_criteria):
        streamer.put(torch.tensor(PROMPT))
        for token in tokenizer("one two " * after, add_special_tokens=False)["input_ids"]:
            streamer.put(torch.tensor([token]))
        raise UsageError("the text is too long; shorten it")

    pieces = []
    with pytest.raises(UsageError, match="too long; shorten it"):
        for piece in streamed(tokenizer, generate):
            pieces.append(piece)
    assert bool(pieces) == bool(after)
