"""Cleaning the fields of a sample: its texts are mended and judged by what they are, all else is kept."""

from __future__ import annotations

import json
from collections import Counter
from random import Random
from typing import Any

import pytest
from cleaning import ALL_MASKED, ENGLISH, RULES

from vlm.data_tools.clean_private import masked
from vlm.data_tools.clean_rules import Reason, load_rules
from vlm.data_tools.clean_text import clean_fields, fault, repaired
from vlm.data_tools.scene_language import caption
from vlm.data_tools.scene_world import LEVELS, Level, compose
from vlm.data_tools.scenes import make_scene
from vlm.samples import SampleError, parse_sample


def test_grammar_captions_stay() -> None:
    dropped: Counter[Reason | None] = Counter()
    for level in LEVELS.values():
        for index in range(1500):
            rng = Random(index)
            text = caption(level, compose(level, rng), rng)
            assert repaired(text, one_line=True) == masked(text, ALL_MASKED) == text
            dropped[fault(text, ENGLISH)] += 1
    assert dropped[None] >= 0.999 * dropped.total(), dropped


@pytest.mark.parametrize("level", LEVELS.values(), ids=list(LEVELS))
def test_drawn_scenes_stay_with_all_their_questions(level: Level) -> None:
    for index in range(60):
        _, fields = make_scene(level, "train", 1, index)
        assert clean_fields(fields, ENGLISH) == (fields, None)


MESSY: dict[str, Any] = {
    "caption": "a  dog &amp; a cat\n",
    "captions": ["a  dog", "zwei  Hunde"],
    "text": "a line  \nand  mail a@b.org\x00",
    "question": "What is&nbsp;it?",
    "answers": ["a  dog ", {"answer": "dog&#39;s", "answer_confidence": "yes"}, 2, True],
    "qa": [{"question": "Who?", "answer": "a@b.org", "type": " kept  as it is", "question_id": 7, "note": "a@b.org"}],
    "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "<image>\n  x = 1  "}], "id": 3},
        {"role": "assistant", "content": "See a@b.org"},
    ],
    "url": "http://example.org/?a=1&amp;b=2",
    "author": "a@b.org",
    "width": 640,
}


def test_texts_are_cleaned_and_all_else_is_kept() -> None:
    before = json.dumps(MESSY)
    clean, reason = clean_fields(MESSY, RULES)
    assert json.dumps(MESSY) == before, "the sample itself was changed"
    assert reason is None
    assert clean == {
        **MESSY,
        "caption": "a dog & a cat",
        "captions": ["a dog", "zwei Hunde"],
        "text": "a line\nand  mail [email]",
        "question": "What is it?",
        "answers": ["a  dog", {"answer": "dog's", "answer_confidence": "yes"}, 2, True],
        "qa": [{**MESSY["qa"][0], "answer": "[email]"}],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "<image>\n  x = 1"}], "id": 3},
            {"role": "assistant", "content": "See [email]"},
        ],
    }  # fmt: skip


def test_nothing_is_mended_when_that_is_off() -> None:
    rules = load_rules(None, ["text.repair=false", "private.emails=keep"])
    assert clean_fields(MESSY, rules) == (MESSY, None)


@pytest.mark.parametrize(
    "text", ["yes", "2", "cat cat cat cat", "www.example.org", "50% off", "#a #b #c", "un chat noir sur la table"]
)
def test_questions_answers_and_messages_may_be_what_a_caption_may_not(text: str) -> None:
    for fields in (
        {"question": "What is it?", "answer": text},
        {"qa": [{"question": text, "answers": [text, text]}]},
        {"messages": [{"role": "user", "content": text}]},
    ):
        assert clean_fields(fields, ENGLISH) == (fields, None)


@pytest.mark.parametrize(
    "fields",
    [
        {"caption": "a red circle", "question": "Click here, what is it?", "answer": "yes"},
        {"caption": "a red circle", "qa": [{"question": "What?", "answers": ["red", "image not available"]}]},
        {
            "caption": "a red circle",
            "messages": [{"role": "user", "content": [{"type": "text", "text": "lorem ipsum"}]}],
        },
        {"caption": "a red circle", "captions": ["a red circle", "click here"]},
    ],
)
def test_one_faulty_text_drops_the_sample(fields: dict[str, Any]) -> None:
    assert clean_fields(fields, RULES)[1] == Reason.BOILERPLATE


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"caption": ""}, Reason.TOO_SHORT),
        ({"caption": "\u200b \n"}, Reason.TOO_SHORT),
        ({"text": "  "}, Reason.TOO_SHORT),
        ({"caption": "", "text": "\x00"}, Reason.TOO_SHORT),
        ({"caption": " ", "question": "What?", "answer": "a dog"}, None),
        ({"caption": "", "text": "two words"}, None),
        ({"question": "\u200b", "answer": "a dog"}, Reason.TOO_SHORT),
        ({"qa": [{"question": "What?", "answers": ["a dog", "\u200b"]}]}, Reason.TOO_SHORT),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}, {"type": "text", "text": "x"}]}]},
            None,
        ),
        ({"width": 3}, None),
        ({}, None),
    ],
)
def test_an_empty_caption_counts_as_none(fields: dict[str, Any], reason: Reason | None) -> None:
    clean, found = clean_fields(fields, RULES)
    assert found == reason
    if reason is None:
        parse_sample("k", {"json": json.dumps(clean).encode(), "png": b""})


@pytest.mark.parametrize(
    "fields",
    [
        {"caption": ["a", "list"]},
        {"captions": "a string"},
        {"captions": [3, None]},
        {"question": None, "answers": "yes"},
        {"qa": "what"},
        {"qa": ["what", None]},
        {"messages": "hello"},
        {"messages": ["hello", {"content": 3}, {"role": "user", "content": ["a", {"type": "text", "text": 3}]}]},
        {"text": 3.5},
    ],
)
def test_what_is_no_text_is_left_to_the_reader_of_samples(fields: dict[str, Any]) -> None:
    assert clean_fields(fields, RULES) == (fields, None)


JUNK = (
    "&amp; &amp;amp; &lt; &#10; &nbsp; Ã¶ â€™ Â é dog <b> … ... @ x@y.org +49 \x1b[31m ﬁ № ’ ， [email] & # 1 0 ( - ; lt Ã "
    "e\u0301 &lt;image&gt; <image> ï¿½ ðŸ˜€ click here"
).split(" ") + [
    " ",
    "\t",
    "\n",
    "\r\n",
    "\x00",
    "\x85",
    "\xa0",
    "\xad",
    "\u200b",
    "\u2028",
    "\u202e",
    "\u3000",
    "\ufeff",
    "\ud83d",
    "\ude00",
]
JUNK += ["+49 170 1234567", "a dog "]


def test_cleaning_twice_changes_nothing_more() -> None:
    for seed in range(1200):
        rng = Random(seed)
        text = "".join(rng.choices(JUNK, k=rng.randint(1, 14)))
        fields = {"caption": text, "text": text, "question": text, "messages": [{"role": "user", "content": text}]}
        once, reason = clean_fields(fields, RULES)
        assert clean_fields(once, RULES) == (once, reason), text


def test_a_cleaned_sample_still_reads() -> None:
    clean, _ = clean_fields({**MESSY, "answers": MESSY["answers"][:2]}, RULES)
    sample = parse_sample("k", {"json": json.dumps(clean).encode(), "png": b""})
    assert (sample.caption, sample.questions[0].answers[1], sample.extra["author"]) == (
        "a dog & a cat",
        "dog's",
        "a@b.org",
    )
    with pytest.raises(SampleError):
        parse_sample("k", {"json": json.dumps(clean_fields({"qa": "what"}, RULES)[0]).encode()})
