"""The page of `vlm data inspect`: one safe file that shows what was counted, and samples as they are."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm.charts import histogram, short
from vlm.data_tools.inspect import Report, inspect
from vlm.data_tools.inspect_page import page, write_page
from vlm.shards import ShardWriter

HOSTILE = '<script>alert("x")</script> & \'"><img src=http://example.org/x onerror=alert(1)>'
VOID = {"meta", "img"}


class Page(HTMLParser):
    """A parsed page: its elements with their attributes, and the text inside each section."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.sections: dict[str, str] = {"": ""}
        self.source = source
        self.feed(source)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len(dict(attributes)) == len(attributes), (tag, attributes)
        self.elements.append((tag, {name: value or "" for name, value in attributes}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        if self.open[-1:] == ["h2"]:
            self.sections[data] = ""
        *_, last = self.sections
        self.sections[last] += data

    @property
    def text(self) -> str:
        return "".join(self.sections.values())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def safe(self) -> None:
        """Nothing in it is run or fetched."""
        names = {tag for tag, _ in self.elements}
        assert not names & {"script", "link", "iframe", "object", "embed", "base", "form", "a", "use", "image"}
        for tag, attributes in self.elements:
            assert not any(name.startswith("on") for name in attributes), (tag, attributes)
            for name in {"src", "srcset", "href", "xlink:href", "data", "action"} & set(attributes):
                assert re.fullmatch(r"data:image/(png|jpeg|webp);base64,[\w+/=]+", attributes[name]), (tag, name)
            assert "url(" not in attributes.get("style", "")
        (style,) = re.findall(r"<style>(.*?)</style>", self.source, re.DOTALL)
        assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style


def picture(size: tuple[int, int] = (40, 30), seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_set(folder: Path, samples: dict[str, dict[str, Any]]) -> Path:
    """Shards of samples given as images (`png`, `0.png`, …) beside JSON fields."""
    with ShardWriter(folder, samples_per_shard=7) as writer:
        for key, sample in samples.items():
            images = {name: value for name, value in sample.items() if isinstance(value, bytes)}
            fields = {name: value for name, value in sample.items() if name not in images}
            writer.write(key, images | {"json": json.dumps(fields).encode()})
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Fifty samples of every kind in eight shards."""
    samples: dict[str, dict[str, Any]] = {}
    for n in range(50):
        asked = [{"question": f"How many in {n}?", "answer": str(k), "type": "count"} for k in range(5)]
        told = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"Look {n}"}]}]
        kinds: list[dict[str, Any]] = [
            {"png": picture(seed=n), "caption": "a kite " * (1 + n % 9), "augmented": True},
            {"png": picture((900, 300), n), "qa": asked},
            {f"{i}.png": picture((8 + i, 9)) for i in range(6)} | {"caption": f"six of {n}"},
            {"png": picture(), "messages": told},
            {"text": f"plain words {n} " * 60},
        ]
        samples[f"key-{n:02d}"] = kinds[n % 5]
    return inspect(write_set(tmp_path_factory.mktemp("page") / "set", samples))


@pytest.fixture(scope="module")
def shown(report: Report) -> Page:
    return Page(page(report))


def test_it_is_one_safe_file(report: Report, shown: Page, tmp_path: Path) -> None:
    out = write_page(report, tmp_path / "deep" / "page.html")
    assert out == tmp_path / "deep" / "page.html" and out.read_text("utf-8") == shown.source
    assert shown.source.startswith("<!doctype html>") and shown.source.endswith("</html>\n")
    shown.safe()
    assert len(shown.source) < 3_000_000


def test_it_shows_the_numbers_of_the_report(report: Report, shown: Page) -> None:
    assert "50 samples in 8 shards" in shown.text and "10 of them were made by augmentation" in shown.text
    assert "90pictures" in shown.text and "50questionsof 1 type" in shown.text and "0faults" in shown.text
    table = shown.sections["All numbers"]
    for label, value in report.rows():
        assert f"{label}{value}" in table
    assert "words: text10180180180180" in table
    for name in ("Captions", "Plain texts", "Questions"):
        assert name in shown.sections["How long the texts are"]
    assert "0 to 6, 1.8 on average" in shown.sections["The pictures"]
    assert "180words, always" in shown.sections["How long the texts are"]
    answered = shown.sections["What is answered"]
    assert all(f"{answer}20.0\u202f%" in answered for answer in range(5))


def test_each_bar_says_its_numbers(report: Report, shown: Page) -> None:
    for low, below, count in report.words["caption"].bins():
        assert (f"{low}: {count}" if below - low == 1 else f"{low} to {below - 1}: {count}") in shown.text


def test_the_contact_sheet_shows_samples_with_their_texts(report: Report, shown: Page) -> None:
    sheet = shown.sections["A look at 36 of them"]
    keys = re.findall(r"key-\d\d", sheet)
    assert keys == [entry.key for _, entry in report.drawn] and len(set(keys)) == 36
    assert "24 more" in sheet and "and 2 questions more" in sheet and "and 2 more" in sheet and "user ▣ Look" in sheet
    assert sheet.count("augmented") == sum(int(key[4:]) % 5 == 0 for key in keys) > 0
    sizes = []
    for image in shown.all("img"):
        data = base64.b64decode(image["src"].partition(",")[2])
        sizes.append(Image.open(io.BytesIO(data)).size)
    assert len(sizes) == sum({0: 1, 1: 1, 2: 4, 3: 1, 4: 0}[int(key[4:]) % 5] for key in keys)
    assert (256, 85) in sizes and max(map(max, sizes)) == 256, "large ones are made small"


def test_the_same_set_gives_the_same_page(report: Report, shown: Page) -> None:
    assert page(inspect(report.path)) == shown.source


def test_tokens_are_asked_for_where_there_are_none(report: Report, shown: Page) -> None:
    assert "--tokenizer" in shown.sections["How long the texts are"]
    counted = inspect(report.path)
    counted.tokenizer, counted.tokens = f"some/{HOSTILE}", counted.words
    said = Page(page(counted))
    said.safe()
    assert f"In tokens of some/{HOSTILE}" in said.text and "--tokenizer" not in said.sections["How long the texts are"]
    assert said.source.count('aria-label="tokens"') == said.source.count('aria-label="words"') > 0


def test_nothing_from_the_data_becomes_markup(tmp_path: Path) -> None:
    told = [{"role": "user", "content": HOSTILE}]
    asked = [{"question": HOSTILE, "answer": HOSTILE, "type": HOSTILE}]
    samples = {
        'a"><script>': {"png": picture(), "caption": HOSTILE, "qa": asked, "messages": told, "text": HOSTILE},
        "<b>": {"png": picture()[:50], "question": HOSTILE, "answers": [], "caption": "half \ud83d"},
    }
    folder = write_set(tmp_path / "<script>alert(1)<", samples)
    hostile = Page(write_page(inspect(folder), tmp_path / "page.html").read_text("utf-8"))
    hostile.safe()
    assert hostile.text.count(HOSTILE) >= 4 and "<script>alert(1)<" in hostile.text and 'a"><script>' in hostile.text
    assert "has no answers" in hostile.sections["What is wrong with them"] and len(hostile.all("img")) == 1


def test_faults_are_listed_and_the_rest_counted(tmp_path: Path) -> None:
    report = inspect(write_set(tmp_path / "set", {f"{n}": {"png": b"x", "caption": "c"} for n in range(130)}))
    said = Page(page(report))
    assert "130faultslisted below" in said.text and "… and 30 faults more" in said.sections["What is wrong with them"]
    assert (
        len(said.all("li")) == 100 and "This picture can not be read." in said.text and "none can be read" in said.text
    )
    assert "The pictures" not in said.sections


def test_shards_that_are_gone_are_said(report: Report, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", {"a": {"text": "words"}})
    gone = inspect(folder)
    (folder / "00000.tar").unlink()
    assert "it was there when the data was opened" in Page(page(gone)).sections["A look at 1 of them"]


def test_a_set_that_holds_nothing(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "set"):
        pass
    empty = Page(page(inspect(tmp_path / "set")))
    assert "0 samples in 0 shards" in empty.text and "There is no sample that can be read." in empty.text


# The chart


def bars_of(svg: str) -> list[tuple[float, float, float]]:
    """Left edge, width and height of each bar."""
    found = re.findall(r'<rect class="f\d" x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="([\d.]+)"', svg)
    return [(float(x), float(width), float(height)) for x, width, height in found]


def test_bars_are_as_high_as_their_counts() -> None:
    svg = histogram([(10, 15, 400), (15, 20, 0), (20, 25, 100), (25, 30, 1)], "words", 12.0)
    bars = bars_of(svg)
    assert bars[0][2] == pytest.approx(4 * bars[2][2], rel=0.01) and bars[1][2] == 0 and 1 < bars[3][2] < 2
    assert len({width for _, width, _ in bars}) == 1
    steps = np.diff([x for x, _, _ in bars])
    assert steps.max() - steps.min() < 0.2 and 'opacity="0.45"' not in svg and "median 12" in svg


def test_what_lies_far_out_is_one_faint_bar() -> None:
    svg = histogram([(0, 10, 900), (10, 20, 90), (20, 5001, 10)], "words", 4.0)
    assert len(bars_of(svg)) == 3 and svg.count('opacity="0.45"') == 1
    assert "≥ 20" in svg and "20 to 5,000: 10" in svg


def test_nothing_is_no_chart() -> None:
    assert histogram([], "words") == ""


def test_numbers_where_there_is_little_room() -> None:
    said = {0: "0", 1.5: "1.5", 999: "999", 9999: "9,999", 12345: "12.3 k", 1_250_000: "1.25 M", 3e9: "3 G"}
    assert {value: short(value).replace("\u202f", " ") for value in said} == said
