"""The report of a cleaning: every number is in both files, nothing supplied becomes markup, and nothing is loaded."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from vlm.charts import percent
from vlm.data_tools.clean_report import LETTERS, Example, Summary, page, write_report
from vlm.data_tools.clean_rules import Reason, Rules, load_rules
from vlm.storage import Folder


def png(colour: str = "red", size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def summary(*examples: Example, rules: Rules | None = None, source: str = "shards/raw") -> Summary:
    reasons = {Reason.TOO_SHORT: 120, Reason.BOILERPLATE: 30, Reason.UNREADABLE: 30}
    return Summary(source, 820, reasons, examples, rules or Rules())


class Reader(HTMLParser):
    """Tags with their attributes, and text; fails at a tag that closes what was not opened."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert not reader.open
    return reader


def test_both_files_hold_the_numbers(tmp_path: Path) -> None:
    rules = load_rules(None, ["captions.min_words=5", "blocked.words=[gun]"])
    write_report(Folder(tmp_path), summary(Example("too short", "a/01", "a cat", png()), rules=rules))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    record = json.loads((tmp_path / "report.json").read_text())
    assert (record["samples"], record["kept"], record["dropped"]) == (1000, 820, 180)
    assert list(record["reasons"].items()) == [("too short", 120), ("boilerplate", 30), ("unreadable image", 30)]
    assert record["examples"] == [{"reason": "too short", "key": "a/01", "text": "a cat"}]
    assert Rules.model_validate(record["rules"]) == rules
    assert record["environment"]["command"] and record["environment"]["versions"]
    shown = read((tmp_path / "report.html").read_text("utf-8"))
    for words in (
        "820",
        f"{percent(0.82)} of 1,000",
        "180",
        "too short (captions.min_words)",
        f"120 · {percent(0.12)}",
        "a/01",
        "a cat",
        "gun",
    ):
        assert words in shown.text, words
    assert "unreadable image" in shown.text and "unreadable image (" not in shown.text


def test_nothing_is_loaded_from_elsewhere() -> None:
    shown = page(summary(Example("too short", "a", "see https://example.org", png())), {})
    loaded = [value for _, values in read(shown).tags for name, value in values.items() if name in ("src", "href")]
    assert loaded and all(str(value).startswith("data:image/png;base64,") for value in loaded)
    assert not re.search(r"<script|<link|@import|url\(", shown)
    assert "prefers-color-scheme: dark" in shown


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onload='x",
    "&lt;b&gt;",
    "</style></pre><b>",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_was_supplied_is_never_markup(text: str) -> None:
    rules = Rules.model_validate({"blocked": {"words": [text]}, "contamination": [text]})
    example = Example("too short", text, text, png())
    shown = read(page(summary(example, rules=rules, source=text), {"command": text, "platform": text}))
    plain = read(page(summary(Example("too short", "k", "t", png())), {"command": "c"}))
    assert [tag for tag, _ in shown.tags] == [tag for tag, _ in plain.tags]
    assert {name for _, values in shown.tags for name in values} == {
        name for _, values in plain.tags for name in values
    }
    assert shown.text.count(text) >= 5


@pytest.mark.parametrize("text", ["half \ud83d of a pair", "\x00\x1b[31m", "\u202egnp.exe", "a\nb"])
def test_any_text_can_be_written(text: str, tmp_path: Path) -> None:
    write_report(Folder(tmp_path), summary(Example("too short", text, text, None), source=text))
    assert json.loads((tmp_path / "report.json").read_text("ascii"))["examples"][0]["text"] == text
    read((tmp_path / "report.html").read_text("utf-8"))


def test_long_texts_are_cut_and_large_pictures_made_small() -> None:
    shown = page(summary(Example("too short", "a", "x" * 100_000, png(size=(4000, 3000)))), {})
    assert "x" * (LETTERS - 1) + "…" in shown and "x" * LETTERS not in shown
    assert len(shown) < 60_000


def test_a_damaged_picture_is_said_to_be_one() -> None:
    assert "This picture can not be read." in page(summary(Example("unreadable image", "a", "", png()[:60])), {})


def test_examples_stand_under_their_reason() -> None:
    examples = [Example("boilerplate", f"b{number}", "click here", None) for number in range(3)]
    text = read(page(summary(*examples, Example("too short", "s", "a", None)), {})).text
    assert text.index("too short 1 of 120") < text.index("boilerplate 3 of 30") < text.index("b0") < text.index("b2")


@pytest.mark.parametrize("kept", [0, 7])
def test_nothing_left_out(kept: int) -> None:
    text = read(page(Summary("raw", kept, {}, [], Rules()), {})).text
    assert "Nothing was left out." in text and "For example" not in text
