"""A page that shows something: one HTML file without network or script. Knows its style, frame, blocks and pictures.

Light and dark are the reader's choice. Knows nothing of what is shown; charts are made in `vlm.charts`.
"""

from __future__ import annotations

import base64
import io
from html import escape

from vlm.errors import UsageError
from vlm.images import open_image

BYTES, SIDE = 80_000, 384

STYLE = """
:root { color-scheme: light dark;
  --page: #faf9f6; --card: #ffffff; --ink: #1d2330; --soft: #626b7c; --rule: #e6e3db; --tint: #f2f0ea;
  --c0: #2f6fb2; --c1: #d9772b; --c2: #2d936c; --c3: #b8478a; --c4: #7a5fc7; --c5: #9a7b12; --c6: #55707f;
  --blind: #a3abb8; --shuffled: #cfc6b4; --good: #1f8a5b; --bad: #c43d3d; --good-tint: #e7f4ed; --bad-tint: #fbeaea; }
@media (prefers-color-scheme: dark) { :root {
  --page: #14171c; --card: #1c2027; --ink: #e8eaee; --soft: #9aa3b2; --rule: #2e343e; --tint: #232831;
  --c0: #6ca9ea; --c1: #f0a05c; --c2: #5cc79b; --c3: #e581ba; --c4: #a994ee; --c5: #d6b84a; --c6: #93adbb;
  --blind: #667080; --shuffled: #57503f; --good: #5ecb98; --bad: #f08080; --good-tint: #18302567; --bad-tint: #3a1e1e88; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", "Noto Sans", sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 1060px; margin: 0 auto; padding: 56px 24px 96px; }
header p { color: var(--soft); max-width: 68ch; font-size: 17px; margin: 0; }
h1 { font-size: 38px; line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 14px; font-weight: 680; }
h2 { font-size: 23px; letter-spacing: -0.01em; margin: 0 0 6px; font-weight: 650; }
h3 { font-size: 15px; margin: 0 0 4px; font-weight: 620; }
section { margin-top: 60px; }
section > p { max-width: 72ch; color: var(--soft); margin: 0 0 20px; }
p b, p strong { color: var(--ink); font-weight: 620; }
code { font: 0.9em ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, monospace; }
a { color: var(--c0); }
.kicker { text-transform: uppercase; letter-spacing: 0.12em; font-size: 12px; font-weight: 650;
  color: var(--c0); margin: 0 0 10px; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 14px; padding: 20px 22px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 14px; margin-top: 32px; }
.tile { display: flex; flex-direction: column; }
.tile .value { font-size: 40px; line-height: 1.15; font-weight: 680; letter-spacing: -0.03em; font-variant-numeric: tabular-nums; }
.tile .name { font-weight: 600; margin-top: 4px; line-height: 1.35; }
.tile .note { color: var(--soft); font-size: 13.5px; line-height: 1.45; margin-top: 6px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 14px; }
.quiet { color: var(--soft); font-size: 14px; }
.card > .quiet { margin: 0 0 10px; }
.none { border: 1px dashed var(--rule); border-radius: 12px; padding: 14px 18px; color: var(--soft); max-width: none; }

svg.chart { display: block; width: 100%; height: auto; overflow: visible; font-family: inherit; }
.grid { stroke: var(--rule); stroke-width: 1; }
.axis { stroke: var(--soft); stroke-width: 1; opacity: 0.5; }
.tick { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.label { fill: var(--soft); font-size: 12.5px; }
.name { font-size: 12.5px; font-weight: 600; }
.line { fill: none; stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round; }
.line.faint { stroke-width: 1; opacity: 0.32; }

.bars .row { display: grid; grid-template-columns: minmax(96px, 190px) 1fr; gap: 16px; padding: 9px 0; align-items: center; }
.bars .row + .row { border-top: 1px solid var(--rule); }
.bars .what { font-weight: 600; font-size: 15px; line-height: 1.3; }
.bar { display: grid; grid-template-columns: 1fr 62px; gap: 12px; align-items: center; }
.bar .track { height: 16px; border-radius: 4px; background: var(--tint); overflow: hidden; }
.bar .track i { display: block; height: 100%; border-radius: 4px; background: var(--c0); }
.bar b { font-size: 15px; font-weight: 640; text-align: right; font-variant-numeric: tabular-nums; }
.bar + .bar { margin-top: 4px; }
.bar + .bar .track { height: 7px; }
.bar + .bar b { font-size: 12.5px; font-weight: 500; color: var(--soft); line-height: 1; }
.bar.blind .track i { background: var(--blind); } .bar.shuffled .track i { background: var(--shuffled); }
.bar.c2 .track i { background: var(--c2); }
.key { display: flex; flex-wrap: wrap; gap: 6px 20px; font-size: 13.5px; color: var(--soft); margin: 0 0 10px; padding: 0; }
.key span::before { content: ""; display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 7px;
  vertical-align: -1px; background: var(--mark); }

.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 14px; }
figure { margin: 0; padding: 0; overflow: hidden; }
figure .shot { display: flex; gap: 8px; background: var(--tint); padding: 16px; justify-content: center; }
figure img { display: block; height: 176px; min-width: 0; max-width: 100%; object-fit: contain; border-radius: 8px; }
figcaption { padding: 14px 18px 16px; font-size: 14px; line-height: 1.45; }
figcaption ul { list-style: none; padding: 0; margin: 0; }
figcaption li { display: grid; grid-template-columns: 20px 1fr; gap: 4px 6px; padding: 3px 0; }
.mark { font-weight: 700; } .right .mark { color: var(--good); } .wrong .mark { color: var(--bad); }
.partly .mark { color: var(--c5); }
.said { font-weight: 640; } .right .said { color: var(--good); } .wrong .said { color: var(--bad); }
.truth { color: var(--soft); }
.told { border-top: 1px solid var(--rule); margin-top: 10px; padding-top: 10px; }
.told div + div { margin-top: 6px; }
.told small { display: block; color: var(--soft); font-size: 12px; }

.time { display: flex; height: 34px; border-radius: 9px; overflow: hidden; margin: 4px 0 16px; gap: 2px; }
.time i { display: flex; align-items: center; justify-content: center; font-style: normal; font-size: 12.5px; font-weight: 620;
  color: #fff; min-width: 3px; overflow: hidden; white-space: nowrap; padding: 0 6px; }
@media (prefers-color-scheme: dark) { .time i { color: #14171c; } }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; }
th { text-align: left; font-weight: 550; color: var(--soft); padding: 7px 16px 7px 0; vertical-align: top; }
td { padding: 7px 0 7px 16px; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
td.n, th.n { text-align: right; padding: 7px 0 7px 16px; }
tr + tr > * { border-top: 1px solid var(--rule); }
.scroll { overflow-x: auto; }
pre { background: var(--tint); border-radius: 10px; padding: 14px 16px; overflow-x: auto; font-size: 13.5px;
  line-height: 1.55; margin: 0; }
pre + pre { margin-top: 8px; }
details { margin-top: 14px; } summary { cursor: pointer; color: var(--soft); font-size: 14.5px; }
details pre { margin-top: 10px; }
dl { margin: 0; display: grid; grid-template-columns: minmax(120px, 190px) 1fr; gap: 10px 24px; font-size: 15px; }
dt { font-weight: 620; } dd { margin: 0; color: var(--soft); max-width: 66ch; }
footer { margin-top: 72px; padding-top: 20px; border-top: 1px solid var(--rule); color: var(--soft); font-size: 13.5px; }
@media (max-width: 640px) { main { padding: 32px 16px 64px; } h1 { font-size: 30px; } .card { padding: 16px; }
  .bars .row, dl { grid-template-columns: 1fr; gap: 4px; } .scroll .chart { min-width: 560px; } }
@media print { body { background: #fff; } .card { break-inside: avoid; } }
""" + "".join(
    f".s{i} {{ stroke: var(--c{i}); }} .f{i} {{ fill: var(--c{i}); }} .t{i} {{ fill: var(--c{i}); }} "
    f".b{i} {{ background: var(--c{i}); }}\n"
    for i in range(7)
)


def document(title: str, body: str, style: str = "") -> str:
    """The whole file around a body of HTML; `style` is CSS of this page alone."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><title>{escape(title)}</title><style>{STYLE}{style}</style></head>'
        f"<body><main>{body}</main></body></html>\n"
    )


def section(title: str, lead: str, *body: str) -> str:
    """One section: heading, what is to be seen, and it."""
    return f"<section><h2>{escape(title)}</h2><p>{lead}</p>{''.join(body)}</section>"


def card(*body: str) -> str:
    """A framed block."""
    return f'<div class="card">{"".join(body)}</div>'


def none(sentence: str) -> str:
    """What stands where a part of the data is missing."""
    return f'<p class="none">{escape(sentence)}</p>'


def tile(value: str, name: str, note: str) -> str:
    """One number, large, with what it is and a remark."""
    return (
        f'<div class="card tile"><div class="value">{value}</div><div class="name">{escape(name)}</div>'
        f'<div class="note">{escape(note)}</div></div>'
    )


def data_uri(data: bytes, most_bytes: int = BYTES, side: int = SIDE) -> str:
    """A picture file as it can stand in a page; empty if it can not be read.

    One of more than `most_bytes`, or of more than `side` pixels on a side, is made smaller.
    """
    try:
        image = open_image(data)
    except UsageError:
        return ""
    kind = "png" if data.startswith(b"\x89PNG") else "webp" if data.startswith(b"RIFF") else "jpeg"
    if len(data) > most_bytes or max(image.size) > side:
        image.thumbnail((side, side))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        data, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
