"""Masking personal data: nothing personal is left wherever it stands, and what only looks like it stays."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
from cleaning import ALL_MASKED

from vlm.data_tools.clean_private import masked
from vlm.data_tools.clean_rules import Reason, Rules
from vlm.data_tools.clean_text import clean_fields, repaired, words

PERSONAL = {
    "[email]": """john.doe@example.com|j_doe+x@mail.example.co.uk|john [at] example [dot] com|john(at)example.com|用户@例子.广告""",
    "[phone]": """+49 170 1234567|+49 (0) 170 1234567|+1 (555) 123-4567|+14155552671|0049 170 1234567|(555) 123-4567
555-123-4567|1-800-555-0199|555.123.4567|020 7946 0958|030/12345678|(030) 1234 5678|01 23 45 67 89|01.23.45.67.89
0612345678|07911 123456|+91 98765 43210|٠١٢٣٤٥٦٧٨٩""",
    "[card]": "4111 1111 1111 1111|5500-0000-0000-0004|4111111111111111|3782 822463 10005",
    "[ip]": "192.168.10.1|2001:db8::8a2e:370:7334|fe80:0:0:0:202:b3ff:fe1e:8329",
}
FOUND = [(mark, text) for mark, texts in PERSONAL.items() for text in texts.replace("\n", "|").split("|")]


@pytest.mark.parametrize(("mark", "text"), FOUND)
@pytest.mark.parametrize("around", ["{}", "a dog, {}, on a chair", "({}) 12 red", "see {}."])
def test_personal_data_is_masked_wherever_it_stands(mark: str, text: str, around: str) -> None:
    assert masked(around.format(text), ALL_MASKED) == around.format(mark)


@pytest.mark.parametrize(("mark", "text"), FOUND)
@pytest.mark.parametrize("between", ["/", " ", " or ", ",", "; "])
def test_of_two_that_touch_nothing_is_left(mark: str, text: str, between: str) -> None:
    assert masked(text + between + text, ALL_MASKED) in (f"{mark}{between}{mark}", mark)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Tel: 12345678", "Tel: [phone]"),
        ("tel. 555 1234", "tel. [phone]"),
        ("call 555-1234", "call [phone]"),
        ("call us at 2345678 or write", "call us at [phone] or write"),
        ("电话：010-62345678", "电话：[phone]"),
        ("whatsapp 9876543210", "whatsapp [phone]"),
        ("mailto:a@b.org?x", "mailto:[email]?x"),
        ("10.0.0.1:8080", "[ip]:8080"),
        ("+49 170 1234567+49 170 1234567", "[phone][phone]"),
    ],
)
def test_what_announces_a_number_stays(text: str, expected: str) -> None:
    assert masked(text, ALL_MASKED) == expected


NOT_PERSONAL = """12.05.2016|05/12/2016|2016-05-12|01.02.2016 15:30|01.02.2016-03.02.2016|in 1990-2000 and 2001-2002
1920x1080 and 3840 x 2160 pixels|10 x 20 x 30 cm|ISBN 978-3-16-148410-0|ISBN 0-306-40615-2|12,345,678 people
1 000 000 000 stars|at 12:30:45 on day 3|4111 1111 1111 1112|iPhone 12 Pro 256|logo@2x.png|shoes @ 50
@username and @other.name|mobile 2015 2016 models|call 911|version 1.2.3|256.300.1.1|std::vector::a|Boeing 747-400
5 + 10 + 15 = 30|room 0123|12345-6789|call a man 5 6 7 8 9 10 11|a text 1 2 3 4 5 6 7|no. 123456789
33° 51′ 25″ S|-0.127758, 51.507351|2011 2012 2013 2014|one 1/2/2016, 3/4/2017|0.1234567891|17.10.1999 12.11.2001"""


@pytest.mark.parametrize("text", NOT_PERSONAL.replace("\n", "|").split("|"))
def test_dates_sizes_and_years_are_not_personal(text: str) -> None:
    assert masked(text, ALL_MASKED) == text


def _check_digit(digits: str) -> str:
    """The digit that makes the Luhn sum a multiple of ten, found by trying, with the sum as the norm words it."""
    for last in "0123456789":
        total = 0
        for place, digit in enumerate(reversed(digits + last)):
            value = int(digit) * (1 + place % 2)
            total += value - 9 if value > 9 else value
        if total % 10 == 0:
            return last
    raise AssertionError


def _personal(rng: Random) -> str:
    def number(count: int) -> str:
        return "".join(rng.choice("0123456789") for _ in range(count))

    def name(others: str = "") -> str:
        letters = "abcdefghijklmnopqrstuvwxyzäöüñ"
        middle = "".join(rng.choice(letters + others) for _ in range(rng.randint(0, 10)))
        return rng.choice(letters) + middle + rng.choice(letters)

    card = rng.choice("3456") + number(14)
    gap = rng.choice(" -.")
    return rng.choice([
        f"{name('._+-')}@{name('-')}.{rng.choice(('com', 'de', 'co.uk', 'museum'))}",
        f"+{rng.choice('123456789')}{number(1)}{gap}{number(3)}{gap}{number(rng.randint(4, 7))}",
        f"0{rng.choice('123456789')}{number(2)}{rng.choice(' /-')}{number(rng.randint(6, 7))}",
        f"({number(3)}) {number(3)}-{number(4)}",
        f"{number(3)}-{number(3)}-{number(4)}",
        f"tel: {rng.choice('123456789')}{number(6)}",
        card + _check_digit(card),
    ])  # fmt: skip


def test_nothing_personal_is_left_of_random_sentences() -> None:
    for seed in range(3000):
        rng = Random(seed)
        said = ["a", "red", "dog,", "on", "the", "chair."]
        for _ in range(rng.randint(1, 3)):
            said.insert(rng.randrange(len(said)), _personal(rng))
        text = " ".join(said)
        clean = masked(text, ALL_MASKED)
        assert not any(char.isdigit() or char == "@" for char in clean), (text, clean)
        assert all(word in clean for word in ("red", "dog", "chair")), (text, clean)
        assert masked(clean, ALL_MASKED) == clean


def test_masks_are_plain_words_that_mean_nothing_special() -> None:
    for mark in PERSONAL:
        assert mark.strip("[]").isalpha() and repaired(mark) == mark and words(mark) == [mark.strip("[]")]


@pytest.mark.parametrize(
    ("name", "text"),
    [("emails", "a@b.org"), ("phones", "+49 170 1234567"), ("cards", "4111 1111 1111 1111"), ("ips", "10.0.0.1")],
)
@pytest.mark.parametrize("field", ["caption", "text", "question", "answer", "messages"])
def test_personal_data_masked_dropped_or_kept_in_every_field(name: str, text: str, field: str) -> None:
    said = f"write to {text} for the dog"
    fields: dict[str, Any] = {field: [{"role": "user", "content": said}] if field == "messages" else said}
    masking, dropping, keeping = (Rules.model_validate({"private": {name: how}}) for how in ("mask", "drop", "keep"))
    found, reason = clean_fields(fields, masking)
    assert reason is None and text not in json.dumps(found) and f"[{name[:-1]}]" in json.dumps(found)
    assert clean_fields(fields, dropping)[1] == Reason.PERSONAL
    assert clean_fields(fields, keeping) == (fields, None)
