"""What a cleaning left out and why, as `report.json` and as a page, `report.html`.

Knows counts, examples and rules. Knows nothing of how they came about. The page needs no network and no script; everything
that a person or the web supplied is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from vlm.charts import Bar, bars, percent
from vlm.machine import environment
from vlm.page import card, data_uri, document, none, section, tile
from vlm.settings import annotated_yaml
from vlm.storage import Folder

from .clean_rules import Reason, Rules

REPORT, PAGE = "report.json", "report.html"
LETTERS = 280  # of an example's text
SIDE, BYTES = 256, 24_000  # of its picture
STYLE = """
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 14px; margin: 12px 0 34px; }
.sheet .card { padding: 0; } .sheet img { height: 128px; }
.sheet figcaption { padding: 11px 15px 14px; font-size: 13.5px; overflow-wrap: anywhere; }
.sheet code { display: block; color: var(--soft); font-size: 12px; } .sheet p { margin: 4px 0 0; white-space: pre-line; }
.bars .row { padding: 6px 0; } .bars .what { font-weight: 500; font-size: 14.5px; } .bar { grid-template-columns: 1fr 132px; }
.bar b { font-weight: 550; font-size: 14px; }
"""


@dataclass(frozen=True)
class Example:
    """A sample that was left out: the reason, its key, its texts, and its first picture's file."""

    reason: str
    key: str
    text: str
    image: bytes | None


@dataclass(frozen=True)
class Summary:
    """What a cleaning found. `reasons` counts the samples left out for each reason."""

    source: str
    kept: int
    reasons: Mapping[str, int]
    examples: Sequence[Example]
    rules: Rules

    @property
    def dropped(self) -> int:
        """How many samples were left out."""
        return sum(self.reasons.values())

    @property
    def seen(self) -> int:
        """How many samples there were."""
        return self.kept + self.dropped


def write_report(folder: Folder, summary: Summary) -> None:
    """Write `report.json` and `report.html` into the folder."""
    made = environment()
    # ASCII, and `replace`: half of a surrogate pair, which JSON may hold, is nothing that UTF-8 can.
    with folder.write(REPORT) as file:
        file.write(json.dumps(_record(summary, made), indent=1).encode("ascii"))
    with folder.write(PAGE) as file:
        file.write(page(summary, made).encode("utf-8", "replace"))


def _record(summary: Summary, made: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "source": summary.source,
        "samples": summary.seen,
        "kept": summary.kept,
        "dropped": summary.dropped,
        "reasons": dict(_ordered(summary)),
        "examples": [
            {"reason": example.reason, "key": example.key, "text": example.text} for example in summary.examples
        ],
        "rules": summary.rules.model_dump(mode="json"),
        "environment": dict(made),
    }


def page(summary: Summary, made: Mapping[str, Any]) -> str:
    """The whole of `report.html`."""
    lead = f"Of <b>{summary.seen:,} samples</b> in <code>{escape(summary.source)}</code>, {summary.kept:,} were kept."
    if summary.dropped:
        lead += " The others stand in <code>dropped</code>, each with its reason."
    head = f'<header><p class="kicker">vlm data clean</p><h1>What was kept, and what was not</h1><p>{lead}</p></header>'
    parts = [head, _tiles(summary), _reasons(summary), _examples(summary), _rules(summary), _footer(made)]
    return document("What cleaning left out", "".join(parts), STYLE)


def _tiles(summary: Summary) -> str:
    share = percent(summary.kept / summary.seen) if summary.seen else "none"
    tiles = [
        tile(f"{summary.kept:,}", "kept", f"{share} of {summary.seen:,}"),
        tile(f"{summary.dropped:,}", "left out", f"for {len(summary.reasons)} of {len(Reason)} reasons"),
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _reasons(summary: Summary) -> str:
    lead = "A sample counts once, for the first reason found. Beside each stands the rule that decides it."
    if not summary.dropped:
        return section("Why", lead, none("Nothing was left out."))
    ordered = _ordered(summary)
    most = ordered[0][1]
    rows = [
        (_named(reason), [Bar(count / most, "samples", text=f"{count:,} · {percent(count / summary.seen)}")])
        for reason, count in ordered
    ]
    return section("Why", lead, card(bars(rows)))


def _ordered(summary: Summary) -> list[tuple[str, int]]:
    """Reasons and counts, the most frequent first; equal ones in alphabetical order."""
    return sorted(
        ((str(reason), count) for reason, count in summary.reasons.items()), key=lambda one: (-one[1], one[0])
    )


def _named(reason: str) -> str:
    rule = Reason(reason).rule
    return f"{reason} ({rule})" if rule else reason


def _examples(summary: Summary) -> str:
    lead = "The first few for each reason. Texts are shown as they came, with whatever personal data they hold."
    sheets = []
    for reason, count in _ordered(summary):
        shown = [example for example in summary.examples if example.reason == reason]
        if shown:
            heading = f'<h3>{escape(reason)} <span class="quiet">{len(shown)} of {count:,}</span></h3>'
            sheets.append(f'{heading}<div class="sheet">{"".join(map(_figure, shown))}</div>')
    return section("For example", lead, *sheets) if sheets else ""


def _figure(example: Example) -> str:
    text = example.text if len(example.text) <= LETTERS else example.text[: LETTERS - 1] + "…"
    said = f'<code>{escape(example.key)}</code><p dir="auto">{escape(text)}</p>'
    return f'<figure class="card">{_shot(example)}<figcaption>{said}</figcaption></figure>'


def _shot(example: Example) -> str:
    if example.image is None:
        return ""
    address = data_uri(example.image, BYTES, SIDE)
    if not address:
        return '<div class="shot"><small>This picture can not be read.</small></div>'
    return f'<div class="shot"><img src="{address}" alt="picture of sample {escape(example.key)}" loading="lazy"></div>'


def _rules(summary: Summary) -> str:
    lead = "All that applied, defaults included; the same file given to <code>--rules</code> repeats this cleaning."
    return section("The rules", lead, f"<pre>{escape(annotated_yaml(summary.rules))}</pre>")


def _footer(made: Mapping[str, Any]) -> str:
    version = made.get("versions", {}).get("vlm")
    facts = [str(made.get("command", "")), f"vlm {version}" if version else "", str(made.get("platform", ""))]
    return f"<footer>{' · '.join(escape(fact) for fact in facts if fact)}</footer>"
