"""Mending and judging texts: every reason with what provokes it and what comes near, nothing personal left, nothing good lost."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from vlm.data_tools.clean_private import masked
from vlm.data_tools.clean_rules import Private, Reason, Rules, load_rules
from vlm.data_tools.clean_text import Kind, clean_fields, fault, repaired, words
from vlm.data_tools.scene_language import caption
from vlm.data_tools.scene_world import LEVELS, Level, compose
from vlm.data_tools.scenes import make_scene
from vlm.samples import SampleError, parse_sample

RULES = Rules()
ENGLISH = load_rules(None, ["language.keep=[en]"])
ALL_MASKED = Private(ips="mask")


# Words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A red circle, a BLUE one.", ["a", "red", "circle", "a", "blue", "one"]),
        ("don't — won’t", ["don't", "won’t"]),
        ("Straße café ﬁne ＡＢＣ", ["strasse", "café", "fine", "abc"]),
        ("黒い猫 cat", ["黒", "い", "猫", "cat"]),
        ("काली बिल्ली", ["काली", "बिल्ली"]),
        ("แมวดำ", ["แ", "ม", "ว", "ดำ"]),
        ("می‌روم خانه", ["می‌روم", "خانه"]),
        ("테이블 위", ["테이블", "위"]),
        ("— … !", []),
    ],
)
def test_words_in_any_script(text: str, expected: list[str]) -> None:
    # ำ is a vowel and a letter of its own, which compatibility form parts in two: ํ and า.
    assert words(text) == [word.replace("ดำ", "ดํ") for word in expected] + ["า"] * text.endswith("ดำ")


# Repair


@pytest.mark.parametrize(
    "text", ["schöne Grüße aus Köln", "el niño y la señora", "it’s a caption – here", "où est le café ?"]
)
@pytest.mark.parametrize("wrong", ["cp1252", "latin-1"])
def test_text_decoded_wrongly_is_restored(text: str, wrong: str) -> None:
    damaged = text.encode("utf-8").decode(wrong)
    assert damaged != text and repaired(damaged) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("salt &amp; pepper &lt;3 &#39;n&#39; so on", "salt & pepper <3 'n' so on"),
        ("&amp;amp;amp; again", "& again"),
        ("a\x00 \x1b[31mred\x1b[0m\u200b cir\u00adcle\ufeff", "a red circle"),
        ("\u202eright to left\u202c", "right to left"),
        ("  a\xa0red\u3000circle \r\n", "a red circle"),
        ("half \ud83d", "half \ufffd"),
        ("a \ud83d\ude00", "a 😀"),
    ],
)
def test_damage_is_mended(text: str, expected: str) -> None:
    assert repaired(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "a red circle",
        "“It’s here,” she said",
        "一只黑猫，在桌子上！",
        "می‌روم",
        "👩‍👩‍👧 a family",
        "def f(x):\n    if x:\n\treturn 1\n\nprint(f(2))",
        "<image>\nWhat is this?",
        "1 < 2 & 3 > 2",
        "E = mc², ½ Å",
    ],
)
def test_what_people_write_stays_as_it_is(text: str) -> None:
    assert repaired(text) == text


def test_a_caption_is_brought_to_one_line_and_a_text_is_not() -> None:
    fields, _ = clean_fields({"caption": "a red\n\n  circle", "text": "one line  \n\n\n\n  and two"}, RULES)
    assert fields == {"caption": "a red circle", "text": "one line\n\n  and two"}


# Reasons: what provokes one, and what comes near

FAULTY: list[tuple[Reason, str, str]] = [
    (Reason.BOILERPLATE, "Click here to see the dog", "a dog sits here, click of a camera"),
    (Reason.BOILERPLATE, "Lorem ipsum dolor sit amet", "a poster in Latin, dolor sit amet"),
    (Reason.BOILERPLATE, "Please enable JavaScript to view this", "a JavaScript book on a desk"),
    (Reason.BOILERPLATE, "This site uses cookies", "these cookies are on a plate"),
    (Reason.BOILERPLATE, "read our cookie policy", "a cookie and a police car"),
    (Reason.BOILERPLATE, "Image not available", "an image of a room that is available"),
    (Reason.BOILERPLATE, "No photo available yet", "no photo shows the sea as well"),
    (Reason.BOILERPLATE, "happy dog stock photo", "a photo of the stock exchange"),
    (Reason.BOILERPLATE, "dogs stock photos & images", "livestock photo taken in a field"),
    (Reason.BOILERPLATE, "IMG_1234.jpg", "a dog named img"),
    (Reason.BOILERPLATE, "DSC00042 copy", "a small dog and DSC00042 on its tag"),
    (Reason.BOILERPLATE, "https://example.org/a/b?c=d", "a dog from https://example.org"),
    (Reason.BOILERPLATE, "photo: www.example.org", "a sign with the words www.example.org"),
    (Reason.BOILERPLATE, "my-red-dress_final.png", "the letters png on a wall"),
    (Reason.BOILERPLATE, "© 2016 Somebody. All rights reserved.", "people march for rights reserved to others"),
    (Reason.BOILERPLATE, "Read more", "a girl who wants to read more"),
    (Reason.BOILERPLATE, '<a href="x">a dog</a>', "a heart drawn as <3 on a wall"),
    (Reason.BOILERPLATE, "{{ product.title }} in red", "a dress with {curly} letters"),
    (Reason.BOILERPLATE, "ein Hund, hier klicken", "ein Hund, hier sitzt er"),
    (Reason.BOILERPLATE, "小狗的照片 点击这里", "小狗的照片 在这里"),
    (Reason.ADVERTISING, "red dress, buy now", "a girl who can buy a dress"),
    (Reason.ADVERTISING, "Red dress with FREE SHIPPING", "a ship free of its ropes"),
    (Reason.ADVERTISING, "a red dress 50% off", "a bottle that is 50% full"),
    (Reason.ADVERTISING, "a lamp, 20 % off", "a wall that is 20 % off-white"),
    (Reason.ADVERTISING, "Order today, a red lamp", "a waiter takes an order in today's cafe"),
    (Reason.ADVERTISING, "red lamp, only $9.99", "a five $ note on a table"),
    (Reason.ADVERTISING, "red lamp price: 10", "a price tag that says $5"),
    (Reason.ADVERTISING, "red lamp add to cart", "a man adds wood to a cart"),
    (Reason.ADVERTISING, "lamp, in stock", "a race in stock cars"),
    (Reason.ADVERTISING, "rote Lampe jetzt kaufen", "eine Frau will eine Lampe kaufen"),
    (Reason.TOO_SHORT, "cat", "black cat"),
    (Reason.TOO_SHORT, "猫", "黒猫"),
    (Reason.TOO_LONG, " ".join(f"word{number}" for number in range(257)), " ".join(f"word{n}" for n in range(256))),
    (Reason.FEW_LETTERS, "12/05/2016 - 14:33 | 0042", "1996 Ford F-150"),
    (Reason.FEW_LETTERS, "★★★★★★★ !!! a dog", "★★ a dog"),
    (Reason.SYMBOLS, "#sunset #beach #love over the sea", "player #7 over the sea"),
    (Reason.SYMBOLS, "a dog… and a cat... and so on", "a dog and a cat and so on…"),
    (Reason.REPETITION, "cat cat cat cat", "the cat and the other cat"),
    (Reason.REPETITION, "red dress red dress red dress red dress", "a red dress, a blue dress, a green dress"),
    (Reason.REPETITION, "dress women dress long dress summer dress", "a dress for women, a long summer dress"),
    (
        Reason.REPETITION,
        "big old red stone house now, big old red stone house then, big old red stone house again",
        "a big old red dog, a big old red cat, a big old red fox, a big old red cow",
    ),
    (Reason.REPETITION, ", ".join(["a man on a bike"] * 4), "a man on a bike next to a man on a bike"),
    (Reason.LANGUAGE, "un chat noir est assis sur la table", "a black cat sits on the table, chat noir"),
    (Reason.LANGUAGE, "красная машина стоит у дома", "a sign with the word машина"),
    (Reason.LANGUAGE, "一只黑猫在桌子上", "a cat and the letters 黑猫"),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "text", "near"), FAULTY)
def test_a_caption_is_dropped_for_its_reason_and_its_neighbour_stays(reason: Reason, text: str, near: str) -> None:
    rules = ENGLISH if reason == Reason.LANGUAGE else RULES
    assert clean_fields({"caption": text}, rules)[1] == reason
    assert clean_fields({"caption": near}, rules) == ({"caption": near}, None)


LINES = ["The first line says one thing.", "The second says more of it.", "A third goes on.", "And a fourth ends it."]
BROKEN = {
    "bullets": ["• " + line for line in LINES],
    "ellipses": [LINES[0] + "...", LINES[1] + "…", *LINES[2:]],
    "same lines": [*LINES[:3], LINES[0], LINES[0]],
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_lines_of_a_document(name: str) -> None:
    text = "\n".join(BROKEN[name])
    rules = load_rules(None, ["text.max_symbols=1", "documents.max_repeated=1"])
    assert fault(text, rules, "document") == Reason.LIST
    assert fault("\n".join(LINES), rules, "document") is None
    assert fault("\n".join(BROKEN[name][:3]), rules, "document") is None, "too few lines to tell"


def test_a_document_may_say_once_what_a_caption_may_not() -> None:
    text = " ".join([*LINES, "Read our cookie policy.", *(line.replace("says", "tells") for line in LINES)])
    assert fault(text, RULES, "document") is None
    assert fault(" ".join([*LINES[:2], "Read our cookie policy."]), RULES, "document") == Reason.BOILERPLATE


def test_every_reason_that_a_text_can_have_is_provoked() -> None:
    provoked = {reason for reason, _, _ in FAULTY} | {Reason.LIST, Reason.BLOCKED, Reason.PERSONAL}
    elsewhere = {Reason.INVALID, Reason.UNREADABLE, Reason.SMALL, Reason.ASPECT, Reason.UNIFORM}
    assert provoked | elsewhere | {Reason.DUPLICATE, Reason.DISAGREEMENT, Reason.CONTAMINATION} == set(Reason)


OFF = {
    Reason.BOILERPLATE: ["text.boilerplate=false"],
    Reason.ADVERTISING: ["text.advertising=false"],
    Reason.TOO_SHORT: ["captions.min_words=0"],
    Reason.TOO_LONG: ["captions.max_words=1000"],
    Reason.FEW_LETTERS: ["text.min_letters=0"],
    Reason.SYMBOLS: ["text.max_symbols=1"],
    Reason.REPETITION: ["text.max_top_word=1", "captions.max_repeated=1"],
    Reason.LANGUAGE: ["language.keep=null"],
}


@pytest.mark.parametrize(("reason", "text", "near"), FAULTY)
def test_every_rule_can_be_switched_off(reason: Reason, text: str, near: str) -> None:
    assert fault(text, load_rules(None, OFF[reason]), "caption") != reason


ORDINARY = """a red circle|two dogs|a cat on a mat|Portrait of a woman, 1912|New York, New York at night
the Eiffel Tower (Paris)|A man riding a wave on top of a surfboard.|a sign that says "STOP"|Boeing 747-400 over the sea
3 cats and 2 dogs|a bathroom with a toilet, a sink and a mirror|very, very, very small bird|Vincent van Gogh: Sunflowers
a bowl of salad — with tomatoes & cheese|25 June 2015: people march|a cookie on a plate|a 1960s kitchen, 10 x 12 feet
eine rote Tasse|赤い円と青い四角|صورة قطة سوداء|красный круг|काली बिल्ली|ตัวอย่างแมวดำ"""


@pytest.mark.parametrize("text", ORDINARY.replace("\n", "|").split("|"))
def test_an_ordinary_caption_stays_word_for_word(text: str) -> None:
    assert clean_fields({"caption": text}, RULES) == ({"caption": text}, None)


# Languages

SENTENCES = {
    "de": "Eine Frau hält einen roten Regenschirm",
    "fr": "Une femme tient un parapluie rouge",
    "es": "Una mujer con un paraguas rojo en la calle",
    "it": "Una donna con un ombrello rosso in mano",
    "nl": "Een vrouw met een rode paraplu in de regen",
    "pl": "Kobieta trzyma czerwony parasol",
    "ru": "Женщина держит красный зонт",
    "tr": "masanın üzerinde siyah bir kedi uyuyor",
    "zh": "一个女人拿着红色的雨伞",
    "ja": "赤い傘を持つ女性",
    "ko": "테이블 위의 검은 고양이",
    "vi": "một con mèo đen nằm trên bàn",
}


@pytest.mark.parametrize("code", SENTENCES)
def test_another_language_is_told(code: str) -> None:
    text = SENTENCES[code]
    assert fault(text, ENGLISH) == Reason.LANGUAGE
    assert fault(text, load_rules(None, [f"language.keep=[en, {code}]"])) is None
    assert (
        fault("a woman with a red umbrella in the street", load_rules(None, [f"language.keep=[{code}]"]))
        == Reason.LANGUAGE
    )


@pytest.mark.parametrize(
    "text", ["Paris", "chat noir", "a cat", "Kind man", "123 456 789 0000", "Toyota Corolla 2015", "赤い円"]
)
def test_too_little_to_tell_a_language_stays(text: str) -> None:
    assert fault(text, load_rules(None, ["language.keep=[en]", "captions.min_words=0", "text.min_letters=0"])) is None


@pytest.mark.parametrize("text", ["portrait of Ludwig van Beethoven", "penne alla puttanesca with parmesan"])
def test_an_english_caption_full_of_foreign_names_stays(text: str) -> None:
    """The likeliest language of these is Dutch and Italian, but not by far."""
    assert fault(text, ENGLISH) is None
    assert fault(text, load_rules(None, ["language.keep=[en]", "language.odds=1.5"])) == Reason.LANGUAGE


# Blocked words


@pytest.mark.parametrize(
    ("entry", "text", "near"),
    [
        ("gun", "a man with a GUN.", "a man with a gunnel"),
        ("Straße", "die STRASSE am Meer", "die Straßen am Meer"),
        ("bad word", "a bad, word here", "a bad wordy sentence"),
        ("война", "это ВОЙНА.", "военный корабль"),
        ("猫", "这是黑猫和狗", "这是狗"),
        ("黒猫", "赤い黒猫です", "黒い猫です"),
        ("बिल्ली", "काली बिल्ली।", "काली बिल्लियाँ"),
        ("café", "a cafe\u0301 at night", "a cafeteria at night"),
        ("ass", "an ass in a field", "a class of grass"),
    ],
)
@pytest.mark.parametrize("in_a_file", [False, True])
def test_blocked_words_are_whole_words_in_any_script(
    entry: str, text: str, near: str, in_a_file: bool, tmp_path: Path
) -> None:
    (tmp_path / "words.txt").write_text(f"# not these\n{entry}\n", "utf-8")
    blocked = {"files": [str(tmp_path / "words.txt")]} if in_a_file else {"words": [entry]}
    rules = Rules.model_validate({"blocked": blocked})
    kinds: tuple[Kind, ...] = ("caption", "document", "question", "message")
    assert {fault(text, rules, kind) for kind in kinds} == {Reason.BLOCKED}
    assert {fault(near, rules, kind) for kind in kinds} == {None}


# Personal data

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


# Samples


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


@pytest.mark.parametrize(
    "junk",
    ["a" * 50_000, "a.b@" * 12_000, "1 " * 25_000, "{{" * 25_000, "<b " * 15_000, "+1" * 25_000, "x@" + "a." * 25_000],
)
def test_text_made_to_be_slow_is_not(junk: str) -> None:
    """Quadratic patterns would take minutes here, and the whole run with them."""
    mended = masked(repaired(junk), ALL_MASKED)
    assert masked(repaired(mended), ALL_MASKED) == mended
    assert fault(mended, ENGLISH, "document") is not None
