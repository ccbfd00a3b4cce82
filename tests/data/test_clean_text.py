"""Mending and judging texts: every reason with what provokes it and what comes near, and nothing good lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from cleaning import ALL_MASKED, ENGLISH, RULES

from vlm.data_tools.clean_private import masked
from vlm.data_tools.clean_rules import Reason, Rules, load_rules
from vlm.data_tools.clean_text import Kind, clean_fields, fault, repaired, words

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


# Time


@pytest.mark.parametrize(
    "junk",
    ["a" * 50_000, "a.b@" * 12_000, "1 " * 25_000, "{{" * 25_000, "<b " * 15_000, "+1" * 25_000, "x@" + "a." * 25_000],
)
def test_text_made_to_be_slow_is_not(junk: str) -> None:
    """Quadratic patterns would take minutes here, and the whole run with them."""
    mended = masked(repaired(junk), ALL_MASKED)
    assert masked(repaired(mended), ALL_MASKED) == mended
    assert fault(mended, ENGLISH, "document") is not None
