"""`vlm data inspect --html`: one page that shows what is in some shards. Knows a report, samples to look at and English.

Knows nothing of how anything was counted. The file needs no network and no script; pictures are in it, made small.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from vlm.charts import Bar, bars, histogram, percent, short
from vlm.errors import RunError, UsageError
from vlm.files import atomic_write
from vlm.page import card, data_uri, document, none, section, tile
from vlm.samples import Question, Sample, parse_sample
from vlm.shards import Entry

from .inspect import Histogram, Report, Tally

LISTED_FAULTS = 100
OPEN = 12  # samples of the contact sheet that are shown at once
CHARTED_TYPES, CHARTED_ANSWERS = 12, 8
# Of one sample on the contact sheet; TEXTS is of captions, of messages and of questions.
IMAGES, TEXTS, LETTERS = 4, 3, 240
SIDE, BYTES = 256, 24_000
STYLE = """
.tiles { grid-template-columns: repeat(auto-fit, minmax(168px, 1fr)); }
.sheet figure { padding: 0; } details .sheet { margin-top: 14px; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(228px, 1fr)); gap: 14px; }
.sheet .shot { flex-wrap: wrap; padding: 14px; } .sheet img { height: 128px; }
.sheet .shot.many img { height: 60px; }
.sheet figcaption { padding: 11px 15px 14px; font-size: 13.5px; overflow-wrap: anywhere; }
.sheet .key { display: block; margin: 0 0 5px; font-size: 12px; }
.sheet p { margin: 0 0 5px; } .sheet ul { margin-top: 7px; padding-top: 6px; border-top: 1px solid var(--rule); }
.sheet li { display: block; } .sheet .said { color: var(--c0); }
.sheet small { color: var(--soft); font-size: 12px; }
.three { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr)); gap: 14px; }
.three .card, .pair .card { min-width: 0; } .three .tile .value { margin-top: 10px; }
@media (min-width: 720px) { .three .wide { grid-column: span 2; } }
.bars .what { font-weight: 500; font-size: 14px; overflow-wrap: anywhere; } .bars .row { padding: 5px 0; }
.bars .row + .row { border-top: 0; } .bar b { font-size: 13.5px; }
.good { color: var(--good); } .bad { color: var(--bad); }
.faults { margin: 0; padding-left: 26px; font-size: 13.5px; line-height: 1.5; overflow-wrap: anywhere; }
.faults li { padding: 3px 0; } .faults li::marker { color: var(--bad); }
td.n { white-space: nowrap; overflow-wrap: normal; }
"""
KINDS = {
    "caption": "Captions",
    "question": "Questions",
    "answer": "Answers",
    "conversation": "Conversations",
    "text": "Plain texts",
}


def write_page(report: Report, out: str | Path) -> Path:
    """Write the page of a report and return its path. Reads the samples of the contact sheet again from their shards."""
    # A half of a surrogate pair, which JSON may hold, is no text that a file can hold.
    data = page(report).encode("utf-8", "replace")
    with atomic_write(out) as file:
        file.write(data)
    return Path(out)


def page(report: Report) -> str:
    """The whole file."""
    name = escape(Path(report.path).resolve().name)
    head = f'<header><p class="kicker">{name}</p><h1>What is in these shards</h1><p>{_opening(report)}</p></header>'
    parts = [_tiles(report), _faults(report), _sheet(report), _samples(report)]
    parts += [_pictures(report), _texts(report), _answers(report), _numbers(report)]
    foot = f"<footer>vlm data inspect {escape(report.path)}</footer>"
    return document(f"{Path(report.path).resolve().name}: what is in it", "".join([head, *parts, foot]), STYLE)


def _opening(report: Report) -> str:
    holds = [f"{number:,} with {part}" for part, number in report.holding.items() if number]
    said = (
        f"<b>{_many(report.samples, 'sample')}</b> in {_many(report.shards, 'shard')} of {_size(report.bytes)} in all"
    )
    made = f" {report.augmented:,} of them were made by augmentation." if report.augmented else ""
    return said + (f": {', '.join(holds)}." if holds else ".") + made


def _tiles(report: Report) -> str:
    tiles = [tile(short(report.samples), "samples", f"{_many(report.shards, 'shard')}, {_size(report.bytes)}")]
    images = report.images_per_sample.total
    if images:
        usual = f"usually {report.widths.median:,g} × {report.heights.median:,g} pixels"
        tiles.append(tile(short(images), "pictures", usual if report.widths.count else "none can be read"))
    if report.captions:
        share = report.distinct_captions / len(report.captions)
        tiles.append(tile(short(len(report.captions)), "captions", f"{percent(share)} of them distinct"))
    asked = sum(tally.total for tally in report.answers.values())
    if asked:
        tiles.append(tile(short(asked), "questions", f"of {_many(len(report.answers), 'type')}"))
    said = "everything was read and checked" if not report.fault_count else "listed below"
    colour = "bad" if report.fault_count else "good"
    tiles.append(tile(f'<span class="{colour}">{report.fault_count:,}</span>', "faults", said))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _faults(report: Report) -> str:
    if not report.fault_count:
        return ""
    lead = "What is not as it was promised. Training stops at some of these and passes over others, so mend them first."
    listed = "".join(f"<li>{escape(fault)}</li>" for fault in report.faults[:LISTED_FAULTS])
    more = report.fault_count - min(len(report.faults), LISTED_FAULTS)
    rest = f'<p class="quiet">… and {_many(more, "fault")} more</p>' if more else ""
    return section("What is wrong with them", lead, card(f'<ol class="faults">{listed}</ol>{rest}'))


def _sheet(report: Report) -> str:
    """Some samples as they are."""
    lead = (
        "Samples drawn by chance, the same ones for the same set. Numbers do not show a caption that belongs to another "
        "picture; a look does."
    )
    figures = [_figure(entry) for _, entry in report.drawn]
    if not figures:
        return section("A look at some of them", lead, none("There is no sample that can be read."))
    shown = f'<div class="sheet">{"".join(figures[:OPEN])}</div>'
    if len(figures) > OPEN:
        rest = f'<div class="sheet">{"".join(figures[OPEN:])}</div>'
        shown += f"<details><summary>{len(figures) - OPEN} more</summary>{rest}</details>"
    return section(f"A look at {len(figures)} of them", lead, shown)


def _figure(entry: Entry) -> str:
    try:
        sample = parse_sample(entry.key, entry.read())
    except (UsageError, RunError) as error:
        return f'<figure class="card"><figcaption>{escape(str(error))}</figcaption></figure>'
    shots = "".join(_shot(sample.key, data) for data in sample.images[:IMAGES])
    many = " many" if len(sample.images) > 1 else ""
    more = f"<small>and {len(sample.images) - IMAGES:,} more</small>" if len(sample.images) > IMAGES else ""
    pictures = f'<div class="shot{many}">{shots}{more}</div>' if shots else ""
    return f'<figure class="card">{pictures}<figcaption>{"".join(_said(sample))}</figcaption></figure>'


def _shot(key: str, data: bytes) -> str:
    address = data_uri(data, BYTES, SIDE)
    if not address:
        return "<small>This picture can not be read.</small>"
    return f'<img src="{address}" alt="picture of sample {escape(key)}" loading="lazy">'


def _said(sample: Sample) -> Iterator[str]:
    made = " · augmented" if sample.extra.get("augmented") else ""
    yield f'<code class="key">{escape(sample.key)}{made}</code>'
    texts = [_paragraph(text) for text in (*sample.captions, *filter(None, [sample.text]))]
    told = [_paragraph(_words(message), message["role"]) for message in sample.messages]
    yield _first(texts, "text") + _first(told, "message")
    if sample.questions:
        yield f"<ul>{_first([_asked(question) for question in sample.questions], 'question', 'li')}</ul>"


def _paragraph(text: str, who: str = "") -> str:
    said_by = f"<small>{escape(who)}</small> " if who else ""
    return f'<p dir="auto">{said_by}{_cut(text)}</p>'


def _words(message: Mapping[str, Any]) -> str:
    return " ".join(part.get("text", "▣") for part in message["content"])


def _first(parts: list[str], thing: str, tag: str = "p") -> str:
    """The first few, and how many there are beside."""
    more = len(parts) - TEXTS
    rest = f"<{tag}><small>and {_many(more, thing)} more</small></{tag}>" if more > 0 else ""
    return "".join(parts[:TEXTS]) + rest


def _asked(question: Question) -> str:
    return f'<li dir="auto">{_cut(question.text)} <span class="said">{_cut(question.answer)}</span></li>'


def _samples(report: Report) -> str:
    lead = "What samples bring along, and how much is to be read for one."
    rows = [
        (part, [Bar(number / report.samples, "of all samples", "c0", short(number))])
        for part, number in report.holding.items()
        if number
    ]
    holding = f'<div class="card wide"><h3>Samples with …</h3>{bars(rows)}</div>' if rows else ""
    size = _chart("Size of a sample", report.bytes_per_sample, "bytes", 6)
    return section("What a sample holds", lead, f'<div class="three">{holding}{size}</div>')


def _pictures(report: Report) -> str:
    if not report.widths.count:
        return ""
    lead = (
        "How many belong together, and their pixels as stored, upright. Training brings all to one size: far larger ones "
        "cost time in reading, far smaller ones have little to show."
    )
    charts = [
        _chart("Pictures of a sample", report.images_per_sample, "pictures", 2),
        _chart("Width", report.widths, "pixels", 2),
        _chart("Height", report.heights, "pixels", 2),
    ]
    return section("The pictures", lead, f'<div class="three">{"".join(charts)}</div>')


def _texts(report: Report) -> str:
    if not report.words:
        return ""
    lead = "Lengths in words, which are what white space parts."
    body = [_lengths(report.words, "words", 0)]
    if report.tokens:
        about = f"In tokens of <code>{escape(str(report.tokenizer))}</code>, without special tokens and chat template."
        body += [f'<h3 style="margin-top:26px">The same in tokens</h3><p class="quiet">{about}</p>']
        body += [_lengths(report.tokens, "tokens", 4)]
    else:
        lead += " A model counts tokens: <code>--tokenizer</code> with a Hugging Face id or a folder shows these too."
    return section("How long the texts are", lead, *body)


def _lengths(lengths: Mapping[str, Histogram], unit: str, colour: int) -> str:
    charts = [_chart(title, lengths[kind], unit, colour) for kind, title in KINDS.items() if kind in lengths]
    return f'<div class="three">{"".join(charts)}</div>'


def _chart(title: str, numbers: Histogram, unit: str, colour: int) -> str:
    if not numbers.count:
        return ""
    heading = f"<h3>{escape(title)}</h3>"
    if numbers.least == numbers.most:
        value = f'<div class="value">{numbers.least:,}</div><div class="note">{unit}, always</div>'
        return f'<div class="card tile">{heading}{value}</div>'
    said = f"{numbers.least:,} to {numbers.most:,}, {_number(numbers.mean)} on average"
    plot = histogram(numbers.bins(), unit, numbers.median, colour)
    return card(heading, f'<p class="quiet">{said}</p>', plot)


def _answers(report: Report) -> str:
    if not report.answers:
        return ""
    lead = (
        "The most frequent answers to each type of question. Where one answer takes most of a type, a model is right "
        "that often without looking."
    )
    ordered = sorted(report.answers.items(), key=lambda one: -one[1].total)
    cards = "".join(_answer_card(kind, tally) for kind, tally in ordered[:CHARTED_TYPES])
    more = len(ordered) - CHARTED_TYPES
    rest = (
        f'<p class="quiet">{_many(more, "type")} more, with fewer questions, in the table below.</p>'
        if more > 0
        else ""
    )
    return section("What is answered", lead, f'<div class="pair">{cards}</div>', rest)


def _answer_card(kind: str, tally: Tally) -> str:
    first = tally.named.most_common(CHARTED_ANSWERS)
    rows = [(text, [Bar(count / tally.total, f"{count:,} times", "c2")]) for text, count in first]
    rest = tally.total - sum(count for _, count in first)
    if rest:
        number = f"{len(tally.named) - len(first):,}" if not tally.others else "all"
        rows.append((f"{number} others", [Bar(rest / tally.total, f"{rest:,} times", "blind")]))
    return card(f"<h3>{escape(kind)}</h3>", f'<p class="quiet">{_many(tally.total, "question")}</p>', bars(rows))


def _numbers(report: Report) -> str:
    """All of the table that the command prints, and what a single chart can not show beside it."""
    measured: Mapping[str, Histogram] = {
        "images per sample": report.images_per_sample,
        "bytes per sample": report.bytes_per_sample,
        "width": report.widths,
        "height": report.heights,
        **{f"words: {kind}": lengths for kind, lengths in report.words.items()},
        **{f"tokens: {kind}": lengths for kind, lengths in report.tokens.items()},
    }
    head = "".join(f'<th class="n">{name}</th>' for name in ("number", "least", "median", "mean", "most"))
    rows = "".join(_number_row(name, numbers) for name, numbers in measured.items() if numbers.count)
    spreads = f'<div class="card scroll"><table><tr><th></th>{head}</tr>{rows}</table></div>'
    listed = "".join(f"<tr><th>{escape(label)}</th><td>{escape(value)}</td></tr>" for label, value in report.rows())
    table = (
        f'<details><summary>The table that the command prints</summary><div class="card scroll"><table>{listed}</table>'
    )
    return section("All numbers", "", spreads, f"{table}</div></details>")


def _number_row(name: str, numbers: Histogram) -> str:
    values = (numbers.count, numbers.least, numbers.median, numbers.mean, numbers.most)
    cells = "".join(f'<td class="n">{_number(value)}</td>' for value in values)
    return f"<tr><th>{escape(name)}</th>{cells}</tr>"


def _many(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _number(value: float) -> str:
    return f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def _size(number: int) -> str:
    return f"{number / 1e9:,.2f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"


def _cut(text: str) -> str:
    return escape(text if len(text) <= LETTERS else text[: LETTERS - 1] + "…")
