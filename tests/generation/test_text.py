"""A reply's text token by token: the tokenizer's own decoding as the judge, stop strings wherever tokens are cut."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vlm.generation.text import ReplyText, text_of

SAID = "Zwei kleine Äpfel, 三個 und ein 🙂 — naïve\n\nfin.  End "


@pytest.fixture(scope="module")
def pieces():
    """A tokenizer that writes spaces before words, as SentencePiece does."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    special = ["<unk>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(
        ["two small words and more small words"] * 5, trainers.BpeTrainer(special_tokens=special)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


def shown(tokenizer, tokens, **options) -> list[str]:
    """What is shown after each token and at the end."""
    text, states = ReplyText(tokenizer, **options), []
    for token in tokens:
        text.add(token)
        states.append(text.shown)
    text.end()
    return [*states, text.shown]


def test_the_whole_is_what_the_tokenizer_says(make_tokenizer, pieces):
    for tokenizer, said in ((make_tokenizer(), SAID), (pieces, "two small words and more")):
        tokens = tokenizer.encode(said, add_special_tokens=False)
        states = shown(tokenizer, tokens)
        assert (
            states[-1] == tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False) == said
        )
        assert all(later.startswith(earlier) for earlier, later in zip(states, states[1:], strict=False))
        assert not any("\ufffd" in state for state in states)
        assert sum(map(bool, states)) > len(tokens) * 0.7


def test_a_text_goes_on_from_what_stands_before(pieces):
    tokens = pieces.encode("two small words", add_special_tokens=False)
    for cut in range(1, len(tokens)):
        before = pieces.decode(tokens[:cut])
        assert before + text_of(pieces, tokens[cut:], before=tokens[:cut]) == "two small words"


def test_half_a_character_at_the_end_is_said_as_it_is(make_tokenizer):
    tokenizer = make_tokenizer()
    tokens = tokenizer.encode("a🙂", add_special_tokens=False)[:-1]
    states = shown(tokenizer, tokens)
    assert states[-2] == "a" and states[-1].startswith("a\ufffd")


@pytest.mark.parametrize("stop", [["fin"], ["\n\n", "End"], ["naïve\n"], ["🙂"], ["nothing like it"], ["ff", "Zwei"]])
def test_nothing_of_a_stop_string_is_ever_shown(make_tokenizer, stop):
    tokenizer = make_tokenizer()
    tokens = tokenizer.encode(SAID, add_special_tokens=False)
    wanted = SAID[: min((place for one in stop if (place := SAID.find(one)) >= 0), default=len(SAID))]
    states = shown(tokenizer, tokens, stop=stop)
    assert states[-1] == wanted and all(wanted.startswith(state) for state in states)


def test_stop_strings_against_plain_search(make_tokenizer):
    """Random words over three letters, so that false starts are everywhere."""
    tokenizer, rng = make_tokenizer(), random.Random(0)
    for _ in range(300):
        said = "".join(rng.choices("abc", k=30))
        stop = ["".join(rng.choices("abc", k=rng.randint(1, 5))) for _ in range(2)]
        text = ReplyText(tokenizer, stop=stop)
        for place, token in enumerate(tokenizer.encode(said, add_special_tokens=False)):
            text.add(token)
            if text.stopped:
                assert any(said[: place + 1].endswith(one) for one in stop)
                break
        text.end()
        # The first to be complete ends the reply; of several complete at once, the one that begins first.
        ends = [(place + len(one), place) for one in stop if (place := said.find(one)) >= 0]
        first = min((end for end, _ in ends), default=None)
        assert text.shown == (said if first is None else said[: min(place for end, place in ends if end == first)])
